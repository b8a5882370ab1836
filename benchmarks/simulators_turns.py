"""How a simulator that owns its round loop takes turns with others: it stops between two rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fleet_parties import Turns, memory_mb

Vector = np.ndarray[Any, Any]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


class Gate:
    """Lets a party pass so many rounds as are asked for.

    The questions are ``rounds N``, answered with the seconds that N rounds took, and ``save PATH``, answered
    once the flat model is in that file.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._left = 0
        self._began = 0.0

    def ready(self) -> bool:
        """Say that rounds can be asked for; return whether there are any."""
        self._turns.ready()
        return self._wait(None)

    def passed(self, vector: Callable[[], Vector]) -> bool:
        """Be told that a round is over and how to get its model; return whether there is another one."""
        self._left -= 1
        if self._left:
            return True
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # What is queued on the device is part of the block.
        seconds = time.perf_counter() - self._began
        self._turns.answer(seconds=seconds, memory_mb=memory_mb())
        return self._wait(vector)

    def _wait(self, vector: Callable[[], Vector] | None) -> bool:
        while asked := self._turns.wait():
            what, _, argument = asked.partition(" ")
            if what == "rounds":
                self._left, self._began = int(argument), time.perf_counter()
                return True
            if vector is None:
                raise RuntimeError(f"{asked!r} was asked before any round.")
            np.save(argument, np.asarray(vector(), dtype=np.float32))
            self._turns.answer(saved=1.0)
        return False
