"""FedAvg: the mean of the participants' updates (McMahan et al., arXiv 1602.05629, Algorithm 1).

Biased when clients participate at different rates: it then optimises the rate-weighted objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from turnout.strategies.checks import choice, unused
from turnout.strategies.rounds import Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import register


@register("fedavg", "strategy", "1602.05629")
@dataclass(kw_only=True)
class FedAvg(StreamingStrategy):
    """Average over the participants, weighted by their examples or uniformly.

    ``weighting``: ``"examples"`` weighs each participant by its number of examples, ``"uniform"`` equally.
    """

    weighting: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("weighting", self.weighting, ("examples", "uniform"))
        unused(type(self).__name__, "client_weights", self.client_weights, "uniform", ", it has weighting")

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round with nothing folded."""
        super().begin_round(server_round, registered)
        self._total = 0

    def fold(self, reply: Reply) -> float:
        """Add the update with its weight."""
        weight = reply.num_examples if self.weighting == "examples" else 1
        self._total += weight
        self.sum.add(reply.update, weight, largest=reply.peak)
        return weight

    def normaliser(self) -> float:
        """Return the participants' total weight."""
        return self._total

    def finish(self, server_round: int) -> Any:
        """Step along the participants' mean update; nobody came: no move."""
        return self.step(self.sum.drain(self._total)) if self._total else self.x
