"""The callback that ties remote clients to a run: verdicts while it folds, what is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from turnout.strategies.rounds import Callback, RoundReport

if TYPE_CHECKING:
    from turnout.strategies.streaming import StreamingStrategy


class CommittingGrid(Protocol):
    """A grid whose clients keep state between rounds, and hear of which round it shall be."""

    def attach(self, strategy: StreamingStrategy, /) -> None:
        """Read the verdicts of ``strategy``."""

    def commit(self) -> None:
        """Note that the rounds so far are durable."""


class CommitCallback(Callback):
    """Put it behind the recorder in ``callbacks``; ``every`` is the recorder's rounds per checkpoint."""

    def __init__(self, grid: CommittingGrid, *, every: int = 1) -> None:
        self._grid = grid
        self._every = every

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        """Let the grid read the strategy's verdicts."""
        self._last = num_rounds
        self._grid.attach(strategy)

    def on_round_end(self, report: RoundReport) -> None:
        """Tell clients that their replies are durable."""
        if report.server_round % self._every == 0 or report.server_round == self._last:
            self._grid.commit()
