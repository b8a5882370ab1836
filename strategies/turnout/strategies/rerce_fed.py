"""RERCE-Fed: ADMM with the dual eliminated, for noisy links (Lari et al., arXiv 2409.13451).

The server broadcasts one extrapolated vector ``s_n = 2 w_n - w_{n-1}``, so that one noisy vector enters a
local update where dual ADMM lets in two; ``w_{n+1}`` is the mean of the scheduled clients' models. In the
continual variant every client keeps iterating with the last vector it received and uploads ``2 w_k,new -
w_k``; the server averages the last upload of every client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.admm import ScheduledADMM
from turnout.strategies.array_api import array_namespace
from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.rounds import Instruction, Reply
from turnout.wire import keys, register


@register("rerce-fed", "strategy", "2409.13451")
@dataclass(kw_only=True)
class RerceFed(ScheduledADMM):
    """Noise-robust ADMM.

    continual
        Unscheduled clients keep updating (they catch up when next scheduled) and the server keeps one vector
        per client. False: an unscheduled client's model stays, the server keeps only w_n and w_{n-1}.
    memory
        Where the continual variant keeps the uploads: ``"ram"``, ``"fp16"``, ``"mmap"``,
        ``"mmap:DIRECTORY"``.
    """

    continual: bool = True
    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("initial", "previous", "slots")
    local_updates: ClassVar[tuple[str, ...]] = ("admm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        open_memory(self.memory)

    def setup(self) -> None:
        """Start at w_0, with no uploads."""
        super().setup()
        self.previous = self.x
        self.slots = MemoryMean(self.x, self.memory)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open an iteration."""
        super().begin_round(server_round, registered)
        self.slots.begin_round()

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Schedule the cohort; the continual variant starts with one upload from everyone."""
        everyone = self.continual and server_round == 1
        nodes = self.schedule(server_round, available, everyone=everyone)
        if self.continual:
            self.slots.expect(self.clients.rows_of(nodes))
        return self.instructions(nodes, "admm", {keys.CONTINUAL: self.continual})

    def broadcast(self) -> Any:
        """Return s_n = 2 w_n - w_{n-1}; continual clients extrapolate themselves and receive w_n."""
        return self.x if self.continual else 2 * self.x - self.previous

    def fold(self, reply: Reply) -> float:
        """Add the model to the mean of the scheduled, or put it into its client's slot."""
        self._came += 1
        if self.continual:
            self.slots.store(reply.client, reply.update, largest=reply.peak)
        else:
            self.sum.add(reply.update, largest=reply.peak)
        return 1.0

    def normaliser(self) -> float:
        """Return |S|, or the number of slots filled."""
        return float(len(self.slots) if self.continual else self._came)

    def finish(self, server_round: int) -> Any:
        """Return w_{n+1}; an iteration in which nobody came changes nothing."""
        if not self._came:
            return self.x
        if self.continual:
            self.slots.commit()
        total = self.slots.total if self.continual else self.sum.value()
        self.previous = self.x
        xp = array_namespace(self.x)
        return xp.astype(total / self.normaliser(), self.x.dtype)
