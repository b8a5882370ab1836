"""How tests end a run after a round."""

from __future__ import annotations

from turnout.strategies import Callback, RoundReport


class Stop(Exception):  # noqa: N818 - what the test ends a run with
    pass


class StopAfter(Callback):
    def __init__(self, server_round: int) -> None:
        self.server_round = server_round

    def on_round_end(self, report: RoundReport) -> None:
        if report.server_round == self.server_round:
            raise Stop
