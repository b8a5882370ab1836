"""The parties of a benchmark: each measured server in a process of its own, asked for one round at a time.

Parties stand side by side and take turns, so that what disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
START_SECONDS = 300.0
Sample = dict[str, float]


class Party:
    """``target(pipe, *arguments)`` in a process of its own; it answers each ``go`` with a `Sample`.

    It sends ``"ready"`` first. A party whose pipe is closed ends, and its own children end with it.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, name: str = "") -> None:
        self.name = name or target.__name__
        self.started: Sample = {}
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_run, args=(target, theirs, arguments), name=self.name)
        self._process.start()
        theirs.close()

    def ready(self) -> Party:
        """Wait until the party can be asked; ``started`` are then the figures of its start."""
        self.started = self._receive("ready")
        return self

    def round(self, seconds: float = 600.0, *, what: str = "go") -> Sample:
        """Return the figures of one round. Raises RuntimeError when the party fails or takes too long."""
        self._pipe.send(what)
        sample: Sample = self._receive("sample", seconds)
        return sample

    def _receive(self, expected: str, seconds: float = START_SECONDS) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise RuntimeError(f"{self.name}: no {expected} within {seconds:g} seconds.")
            kind, value = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} ended without a {expected}; see its output above.") from error
        if kind != expected:
            raise RuntimeError(f"{self.name} sent {kind} {value!r}, expected a {expected}.")
        return value

    def close(self) -> None:
        """End the party."""
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._process.join(20)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(5)
        self._pipe.close()

    def __enter__(self) -> Party:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(target: Callable[..., None], pipe: Connection, arguments: Sequence[Any]) -> None:
    # Nothing but the result goes to standard output.
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        target(Turns(pipe), *arguments)


class Turns:
    """A party's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ready(self, **figures: float) -> None:
        """Say that rounds can be asked for, and what the start took."""
        self._pipe.send(("ready", figures))

    def wait(self) -> str:
        """Return what is asked for, mostly ``go``; nothing when no more is."""
        try:
            asked = str(self._pipe.recv())
        except EOFError:
            return ""
        return "" if asked == "stop" else asked

    def answer(self, **figures: float) -> None:
        """Answer what was asked last."""
        self._pipe.send(("sample", figures))


@contextlib.contextmanager
def children(calls: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> Iterator[None]:
    """Run ``(target, arguments)`` each in a process that ends with this one.

    When one fails, this process ends at once with the others: nobody waits for what cannot come.
    """
    processes = [SPAWN.Process(target=target, args=tuple(args), daemon=True) for target, args in calls]
    for process in processes:
        process.start()
    ending = threading.Event()
    threading.Thread(target=_watch, args=(processes, ending), daemon=True).start()
    try:
        yield
    finally:
        ending.set()
        deadline = time.monotonic() + 10
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _watch(processes: Sequence[Any], ending: threading.Event) -> None:
    while not ending.wait(0.5):
        failed = [process for process in processes if process.exitcode]
        if failed:
            print(f"{failed[0].name} ended with {failed[0].exitcode}", file=sys.stderr, flush=True)
            for process in processes:
                process.kill()
            os._exit(1)


def take_turns(parties: Sequence[Party], turns: int, *, warm_up: int = 1) -> list[list[Sample]]:
    """Return each party's samples of ``turns`` rounds; in each turn every party has one."""
    samples: list[list[Sample]] = [[] for _ in parties]
    for turn in range(-warm_up, turns):
        for rows, party in zip(samples, parties, strict=True):
            sample = party.round()
            if turn >= 0:
                rows.append(sample)
        shown = ", ".join(
            f"{p.name} {rows[-1]['seconds']:.3f} s" for p, rows in zip(parties, samples, strict=True) if rows
        )
        print(f"turn {turn + 1}/{turns}: {shown or 'warm-up'}", file=sys.stderr)
    return samples


def median_of(samples: Sequence[Sample], name: str = "seconds") -> float:
    """Return the median of one figure."""
    return statistics.median(sample[name] for sample in samples)


def paired(over: Sequence[Sample], under: Sequence[Sample], name: str = "seconds") -> float:
    """Return the median of the turns' ratios of one figure."""
    return statistics.median(a[name] / b[name] for a, b in zip(over, under, strict=True))


def memory_mb(field: str = "VmRSS", pid: int | str = "self") -> float:
    """Return a field of ``/proc/PID/status``, such as VmRSS or VmHWM (its peak), in MB of 1e6 bytes.

    Not getrusage: its peak includes the process that a process was forked from.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return math.nan


def reset_peak() -> None:
    """Let this process's VmHWM start again from what it uses now."""
    Path("/proc/self/clear_refs").write_text("5")


def rounded(row: dict[str, Any], digits: int = 4) -> dict[str, Any]:
    """Return ``row`` with floats cut to ``digits`` significant ones."""
    return {
        name: float(f"{value:.{digits}g}") if isinstance(value, float) else value
        for name, value in row.items()
    }
