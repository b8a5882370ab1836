"""The callback that ties a fleet to a run: verdicts while it folds, acknowledgements when it is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turnout.server.fleet.grid import FleetGrid
from turnout.strategies.rounds import Callback, RoundReport

if TYPE_CHECKING:
    from turnout.strategies.streaming import StreamingStrategy


class CommitCallback(Callback):
    """Put it behind the recorder in ``callbacks``; ``every`` is the recorder's rounds per checkpoint."""

    def __init__(self, grid: FleetGrid, *, every: int = 1) -> None:
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
