"""Unbiased FedAvg: each update is weighted by 1 / p_i, its client's known participation probability.

The baseline that FedAU (arXiv 2306.03401, ``known_prob``) and FedStale (arXiv 2405.04171, beta = 0)
compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turnout.strategies.participation import Participation, check_participation, known_probability
from turnout.strategies.rounds import Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import ConfigError, register


@register("unbiased-fedavg", "strategy", "2306.03401")
@dataclass(kw_only=True)
class UnbiasedFedAvg(StreamingStrategy):
    """Sum of ``(alpha_i / p_i) * update_i`` over the participants: the expected step is the full one.

    ``participation``: p_i by client id (mapping or sequence), or one number for all.
    """

    participation: Participation = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.participation is None:
            raise ConfigError("participation is needed: give p by client id, or use the strategy 'fedau'.")
        check_participation(self.participation, estimate=False, num_clients=self.num_clients)

    def weight(self, reply: Reply) -> float:
        """Return alpha_i / p_i before normalisation."""
        assert self.participation is not None
        assert not isinstance(self.participation, str)
        client = self.clients.key(reply.client)
        return self.alpha(reply) / known_probability(self.participation, client)

    def check(self, reply: Reply) -> None:
        """Refuse a client whose probability is not given."""
        self.weight(reply)

    def fold(self, reply: Reply) -> float:
        """Add the update, weighted by alpha_i / p_i."""
        weight = self.weight(reply)
        self.sum.add(reply.update, weight, largest=reply.peak)
        return weight

    def finish(self, server_round: int) -> Any:
        """Step along the weighted sum; nobody came: the sum is zero."""
        return self.step(self.sum.drain(self.normaliser()))
