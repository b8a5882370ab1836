"""FedVARP: absent clients are represented by their last update (Jhunjhunwala et al., arXiv 2207.14130).

Original rule (uniform participation): ``x + eta * [mean_j y_j + mean_{i in S} (Delta_i - y_i)]``; with
probabilities given, the heterogeneous rule ``x + eta * [sum_j alpha_j y_j + sum_{i in S} (alpha_i / p_i)
(Delta_i - y_i)]``, which is FedStale's beta = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.checks import unused
from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.participation import Participation, check_participation, known_probability
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import register


@register("fedvarp", "strategy", "2207.14130")
@dataclass(kw_only=True)
class FedVARP(StreamingStrategy):
    """Variance reduction by the memory of all clients' last updates.

    participation
        None for the original rule (a mean over the participants); p_i by client id, or one number, for the
        heterogeneous rule.
    memory
        Where the updates are kept: ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.
    """

    participation: Participation = None
    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("stale",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_participation(self.participation, estimate=False, num_clients=self.num_clients)
        if self.participation is None:  # The mean over the participants would not aim at that objective.
            reason = " unless participation is given"
            unused("FedVARP", "client_weights", self.client_weights, "uniform", reason)
        open_memory(self.memory)

    def setup(self) -> None:
        """Start with an empty memory (y = 0)."""
        self.stale = MemoryMean(self.x, self.memory)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self.stale.begin_round()
        self._came = 0

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Ask everyone available; their stored updates will be needed."""
        self.stale.expect(self.clients.rows_of(available))
        return super().select(server_round, available)

    def weight(self, reply: Reply) -> float:
        """Return the factor on ``Delta_i - y_i`` before normalisation: 1, or alpha_i / p_i."""
        if self.participation is None or isinstance(self.participation, str):
            return 1.0
        client = self.clients.key(reply.client)
        return self.alpha(reply) / known_probability(self.participation, client)

    def check(self, reply: Reply) -> None:
        """Refuse a client whose probability is not given."""
        self.weight(reply)

    def fold(self, reply: Reply) -> float:
        """Add ``Delta_i - y_i`` with its weight, then remember Delta_i."""
        weight = self.weight(reply)
        self.sum.add(reply.update, weight, largest=reply.peak)
        old = self.stale.get(reply.client)
        if old is not None:
            self.sum.add(old, -weight, largest=self.stale.peak(reply.client))
        self.stale.store(reply.client, reply.update, self.alpha(reply), largest=reply.peak)
        self._came += 1
        return weight

    def normaliser(self) -> float:
        """Return |S| for the original rule, N (or n) for the heterogeneous one."""
        return float(self._came) if self.participation is None else super().normaliser()

    def finish(self, server_round: int) -> Any:
        """Step along corrected mean plus mean memory; the original rule does not move in an empty round."""
        if self.participation is None and not self._came:
            return self.x
        direction = self.stale.total / super().normaliser() + self.sum.value() / self.normaliser()
        self.stale.commit()
        return self.step(direction)
