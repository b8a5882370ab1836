"""FedVARP: absent clients are represented by their last update (Jhunjhunwala et al., arXiv 2207.14130).

Original rule (uniform participation): ``x + eta * [mean_j y_j + mean_{i in S} (Delta_i - y_i)]``; with
probabilities given, the heterogeneous rule ``x + eta * [sum_j alpha_j y_j + sum_{i in S} (alpha_i / p_i)
(Delta_i - y_i)]``, which is FedStale's beta = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.participation import Participation, check_participation, known_probability
from turnout.strategies.rounds import Reply
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
        ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.
    """

    participation: Participation = None
    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("stale",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_participation(self.participation, estimate=False)
        open_memory(self.memory)

    def setup(self) -> None:
        """Start with an empty memory (y = 0)."""
        self.stale = MemoryMean(self.x, self.memory)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self.stale.begin_round()
        self._came = 0

    def fold(self, reply: Reply) -> float:
        """Add ``Delta_i - y_i`` with its weight, then remember Delta_i."""
        weight = 1.0
        if self.participation is not None and not isinstance(self.participation, str):
            client = self.clients.entries[reply.client].key
            weight = self.alpha(reply) / known_probability(self.participation, client)
        self.sum.add(reply.update, weight, largest=reply.peak)
        old = self.stale.get(reply.client)
        if old is not None:
            self.sum.add(old, -weight)
        self.stale.store(reply.client, reply.update, self.alpha(reply))
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
        self.stale.commit(server_round)
        return self.step(direction)
