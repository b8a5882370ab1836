"""MIFA: the mean over all clients of their latest updates (Gu et al., arXiv 2106.04159, Algorithm 1).

Unlike FedVARP the memory is refreshed first: ``y_i <- Delta_i`` on S, then ``x + eta * sum_j alpha_j y_j``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import register


@register("mifa", "strategy", "2106.04159")
@dataclass(kw_only=True)
class MIFA(StreamingStrategy):
    """Every client counts in every round, absent ones with what they last sent.

    ``memory``: where the updates are kept, ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.
    """

    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("latest",)

    def __post_init__(self) -> None:
        super().__post_init__()
        open_memory(self.memory)

    def setup(self) -> None:
        """Start with an empty memory (y = 0)."""
        self.latest = MemoryMean(self.x, self.memory)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self.latest.begin_round()

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Ask everyone available; their stored updates will be needed."""
        self.latest.expect(self.clients.rows_of(available))
        return super().select(server_round, available)

    def fold(self, reply: Reply) -> float:
        """Remember the update."""
        weight = self.alpha(reply)
        self.latest.store(reply.client, reply.update, weight, largest=reply.peak)
        return weight

    def finish(self, server_round: int) -> Any:
        """Step along the mean memory, this round's updates included."""
        self.latest.commit()
        return self.step(self.latest.total / self.normaliser())
