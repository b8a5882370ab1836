"""Trackers beside a run: each on a thread of its own, so that a slow one delays no round."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from turnout.server.recorder import model_sha256
from turnout.server.schema import RunRow
from turnout.server.trackers.tracker import Status, Tracker, TrackerSpec, round_metrics
from turnout.strategies import Callback, RoundReport

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Result

    from turnout.strategies import StreamingStrategy

_MOST_WAITING: Final = 10_000
_PATIENCE_SECONDS: Final = 30.0


class TrackingCallback(Callback):
    """Shows a run in every tracker of ``specs``; a context manager around one run or several in turn.

    `begin` names the run before it starts. A tracker that fails is left out from then on, and ``warn`` is
    told once; leaving the context waits at most half a minute for slow ones.
    """

    def __init__(self, specs: Sequence[TrackerSpec], warn: Callable[[str], object]) -> None:
        self._specs, self._warn = specs, warn
        self._run: tuple[RunRow, Path] | None = None
        self._lanes: list[_Lane] = []

    def __enter__(self) -> TrackingCallback:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", None)

    def begin(self, run: RunRow, directory: Path) -> None:
        """Take the next run, whose directory is ``directory``."""
        self._run = run, directory

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        """Start the trackers."""
        if self._run is None:
            raise RuntimeError("begin() names the run before it starts.")
        run, directory = self._run
        for spec in self._specs:
            lane = _Lane(spec, self._warn)
            lane.post(lambda tracker: tracker.start(run, directory, first_round=first_round))
            self._lanes.append(lane)

    def on_round_end(self, report: RoundReport) -> None:
        """Hand a round over."""
        if self._lanes:
            metrics, server_round = round_metrics(report), report.server_round
            for lane in self._lanes:
                lane.post(lambda tracker: tracker.log(server_round, metrics))

    def on_finish(self, strategy: StreamingStrategy, result: Result) -> None:
        """Say how the run ended, with the hash of its model."""
        self._close("finished", model_sha256(result.arrays) if self._lanes else None)

    def _close(self, status: Status, sha256: str | None) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.post(lambda tracker: tracker.finish(status, sha256))
            lane.end()
        for lane in lanes:
            lane.join(_PATIENCE_SECONDS)


class _Lane:
    """One tracker and the thread that it works on."""

    def __init__(self, spec: TrackerSpec, warn: Callable[[str], object]) -> None:
        self._spec, self._warn = spec, warn
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"turnout-{spec.slug}", daemon=True)
        self._thread.start()

    def post(self, call: Callable[[Tracker], None]) -> None:
        if self._failed:
            return
        if self._waiting.qsize() >= _MOST_WAITING:
            self._fail(f"it is {_MOST_WAITING} rounds behind")
        else:
            self._waiting.put(call)

    def end(self) -> None:
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._fail(f"it does not end within {seconds:g} seconds")

    def _work(self) -> None:
        try:
            tracker = self._spec.make()
            while (call := self._waiting.get()) is not None:
                if not self._failed:
                    call(tracker)
        except Exception as error:  # Whatever ails a tracker is no matter of the run.
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._warn(f"--log-to {self._spec.slug}: left out from now on, the run goes on: {why}")
