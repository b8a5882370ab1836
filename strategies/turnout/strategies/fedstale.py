"""FedStale: a convex combination of fresh and stale updates (Rodio and Neglia, arXiv 2405.04171).

``agg = sum_{i in S} (alpha_i / p_i) (Delta_i - beta h_i) + beta sum_j alpha_j h_j``, then ``h_i <-
Delta_i`` on S: beta = 0 is unbiased FedAvg, beta = 1 is FedVARP for heterogeneous p, and in between
``(1 - beta) * UnbiasedFedAvg + beta * FedVARP``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from turnout.strategies.checks import choice, number
from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.participation import (
    Participation,
    ParticipationEstimator,
    check_participation,
    known_probability,
)
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import ConfigError, register


@register("fedstale", "strategy", "2405.04171")
@dataclass(kw_only=True)
class FedStale(StreamingStrategy):
    """Corrects fresh updates by stored ones, as far as ``beta`` says.

    beta
        Weight of the stale part in [0, 1]. Lower it when data are alike or participation is very uneven.
    participation
        p_i by client id (mapping or sequence), one number for all, or ``"estimate"``: 1 / omega_i of FedAU.
    empty_round
        Nobody came: ``"memory"`` moves by the stale mean (needed for unbiasedness), ``"skip"`` stays.
    max_weight
        Bound on 1 / p_i (None: no bound); a bound limits variance and brings bias back.
    memory
        Where the updates are kept: ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.
    """

    beta: float = 0.5
    participation: Participation = "estimate"
    empty_round: Literal["memory", "skip"] = "memory"
    max_weight: float | None = None
    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("stale", "estimator")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, "in [0, 1] (0 is FedAvg, 1 is FedVARP)", least=0.0, most=1.0)
        if self.participation is None:
            raise ConfigError("participation must be probabilities or 'estimate', got None.")
        check_participation(self.participation, estimate=True, num_clients=self.num_clients)
        choice("empty_round", self.empty_round, ("memory", "skip"))
        if self.max_weight is not None:
            number("max_weight", self.max_weight, "a number of at least 1, or None", least=1.0)
        open_memory(self.memory)

    def setup(self) -> None:
        """Start with an empty memory (h = 0)."""
        self.stale = MemoryMean(self.x, self.memory)
        self.estimator = ParticipationEstimator()

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self.stale.begin_round()
        self._round, self._came = server_round, set[int]()
        self._largest_weight = 0.0

    def on_register(self, rows: int | range, server_round: int) -> None:
        """Count the clients as absent from now on."""
        self.estimator.register(rows, server_round)

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Ask everyone available; their stored updates will be needed."""
        self.stale.expect(self.clients.rows_of(available))
        return super().select(server_round, available)

    def inverse_probability(self, client: int) -> float:
        """Return 1 / p of the client in this round, known or estimated from earlier rounds."""
        if isinstance(self.participation, str):
            inverse = self.estimator.weight(client, self._round)
        else:
            assert self.participation is not None
            inverse = 1.0 / known_probability(self.participation, self.clients.key(client))
        return inverse if self.max_weight is None else min(inverse, self.max_weight)

    def check(self, reply: Reply) -> None:
        """Refuse a client whose probability is not given."""
        self.inverse_probability(reply.client)

    def fold(self, reply: Reply) -> float:
        """Add ``(alpha_i / p_i) (Delta_i - beta h_i)``, then remember Delta_i."""
        inverse = self.inverse_probability(reply.client)
        weight = self.alpha(reply) * inverse
        self.sum.add(reply.update, weight, largest=reply.peak)
        old = self.stale.get(reply.client)
        if old is not None and self.beta:
            self.sum.add(old, -weight * self.beta, largest=self.stale.peak(reply.client))
        self.stale.store(reply.client, reply.update, self.alpha(reply), largest=reply.peak)
        self._came.add(reply.client)
        self._largest_weight = max(self._largest_weight, inverse)
        return weight

    def finish(self, server_round: int) -> Any:
        """Step along the fresh part plus beta times the mean memory of all clients before this round."""
        skip = not self._came and self.empty_round == "skip"
        direction = (self.sum.value() + self.beta * self.stale.total) / self.normaliser()
        self.stale.commit()
        self.estimator.observe(server_round, self._came)
        return self.x if skip else self.step(direction)

    def diagnostics(self) -> dict[str, float]:
        """Largest 1 / p used, and how many clients are remembered."""
        return {"max-weight": self._largest_weight, "remembered-clients": float(len(self.stale))}
