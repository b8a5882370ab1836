"""FedAU: unknown participation statistics, estimated online (Wang and Ji, ICLR 2024, arXiv 2306.03401).

Algorithm 1 with the weights of Algorithm 2: ``x <- x + (eta / N) * sum_{i in S_t} omega_i^t * Delta_i``,
where omega_i^t is the mean interval between participations of client i before round t. Divided by all N
clients, never by those present.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.participation import ParticipationEstimator
from turnout.strategies.rounds import Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import register


@register("fedau", "strategy", "2306.03401")
@dataclass(kw_only=True)
class FedAU(StreamingStrategy):
    """Weights each update by an estimate of 1 / p_i from three numbers per client.

    ``cutoff``: K, the longest interval counted; it bounds the weights, hence the variance, at the price of
    bias. None: no bound.
    """

    cutoff: int | None = 50

    state_names: ClassVar[tuple[str, ...]] = ("estimator",)

    def setup(self) -> None:
        """Start the estimator."""
        self.estimator = ParticipationEstimator(self.cutoff)
        self._used: dict[int, float] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        ParticipationEstimator(self.cutoff)  # Checks the cutoff when the strategy is made.

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round; the weights of this round depend on earlier rounds only."""
        super().begin_round(server_round, registered)
        self._round, self._used = server_round, {}

    def on_register(self, rows: int | range, server_round: int) -> None:
        """Count the clients as absent from now on."""
        self.estimator.register(rows, server_round)

    def fold(self, reply: Reply) -> float:
        """Add the update, weighted by alpha_i * omega_i."""
        omega = self._used[reply.client] = self.estimator.weight(reply.client, self._round)
        weight = self.alpha(reply) * omega
        self.sum.add(reply.update, weight, largest=reply.peak)
        return weight

    def finish(self, server_round: int) -> Any:
        """Step along the weighted sum over N, then let the estimator see who came."""
        self.estimator.observe(server_round, self._used)
        return self.step(self.sum.drain(self.normaliser()))

    def diagnostics(self) -> dict[str, float]:
        """Largest omega used, and the effective weight sum omega / N, whose mean should approach 1."""
        omegas = self._used.values()
        return {
            "max-omega": max(omegas, default=1.0),
            "effective-weight": sum(sorted(omegas)) / max(1, len(self.clients)),
        }
