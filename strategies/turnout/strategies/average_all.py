"""Average over all clients, absent ones counting as zero (``average_all`` in FedAU, arXiv 2306.03401)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turnout.strategies.rounds import Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import register


@register("average-all", "strategy", "2306.03401")
@dataclass(kw_only=True)
class AverageAll(StreamingStrategy):
    """``(1/N) * sum of the participants' updates``: small steps when few come, biased like FedAvg."""

    def fold(self, reply: Reply) -> float:
        """Add the update with its objective weight."""
        weight = self.alpha(reply)
        self.sum.add(reply.update, weight, largest=reply.peak)
        return weight

    def finish(self, server_round: int) -> Any:
        """Step along the sum divided by N."""
        return self.step(self.sum.drain(self.normaliser()))
