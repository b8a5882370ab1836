"""How a run is stopped from outside: at the end of its round, or at once when asked again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever runs this process wants it gone in good order, which is no failure."""


class StopSignals:
    """Notes the first of ``signals``; `check` raises it when a round is committed.

    An exception raised wherever the program is might get lost, or tear a round apart. While ``idle`` says
    that nothing is under way it is raised at once, and so is the second signal. Outside the main thread
    signals are left alone.

    Raises KeyboardInterrupt, and `Terminated` after SIGTERM.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> None:
        self.idle: Callable[[], bool] = lambda: False
        self._signals = signals
        self._noted: KeyboardInterrupt | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raise what was noted."""
        if self._noted is not None:
            raise self._noted

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        again = self._noted is not None
        self._noted = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if again or self.idle():
            raise self._noted
