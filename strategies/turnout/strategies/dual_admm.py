"""Consensus ADMM in its textbook form, the baseline of RERCE-Fed (arXiv 2409.13451, sections on noisy links).

Client: ``z_k <- z_k + rho (w_k - w_n)``, then the primal solve. Server: ``w_{n+1} = (1/K) sum_k (w_k + z_k
/ rho)`` over the last upload of every client; averaging only the uploads of a random cohort would diverge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from turnout.strategies.admm import ScheduledADMM
from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import choice
from turnout.strategies.memory import open_memory
from turnout.strategies.memory_mean import MemoryMean
from turnout.strategies.rounds import Instruction, Reply
from turnout.wire import keys, register


@register("dual-admm", "strategy", "2409.13451")
@dataclass(kw_only=True)
class DualADMM(ScheduledADMM):
    """ADMM with the dual at the clients.

    form
        ``"dual"``: the textbook iteration with the last upload of every client kept. ``"two-copies"``: the
        dual eliminated at the client, which extrapolates from two received (noisy) models; the server
        averages the scheduled models.
    memory
        Where the uploads are kept: ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.
    """

    form: Literal["dual", "two-copies"] = "dual"
    memory: str = "ram"

    state_names: ClassVar[tuple[str, ...]] = ("initial", "slots")
    local_updates: ClassVar[tuple[str, ...]] = ("dual-admm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("form", self.form, ("dual", "two-copies"))
        open_memory(self.memory)

    def setup(self) -> None:
        """Start at w_0, with no uploads."""
        super().setup()
        self.slots = MemoryMean(self.x, self.memory)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open an iteration."""
        super().begin_round(server_round, registered)
        self.slots.begin_round()

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Schedule the cohort; the dual form starts with one upload from everyone."""
        dual = self.form == "dual"
        nodes = self.schedule(server_round, available, everyone=dual and server_round == 1)
        if dual:
            self.slots.expect(self.clients.rows_of(nodes))
            return self.instructions(nodes, "dual-admm", {})
        return self.instructions(nodes, "admm", {keys.CONTINUAL: False, keys.EXTRAPOLATE: True})

    def fold(self, reply: Reply) -> float:
        """Keep the upload (dual form) or add it to the mean of the scheduled."""
        self._came += 1
        if self.form == "dual":
            self.slots.store(reply.client, reply.update, largest=reply.peak)
        else:
            self.sum.add(reply.update, largest=reply.peak)
        return 1.0

    def normaliser(self) -> float:
        """Return the number of uploads kept, or |S|."""
        return float(len(self.slots) if self.form == "dual" else self._came)

    def finish(self, server_round: int) -> Any:
        """Return w_{n+1}; an iteration in which nobody came changes nothing."""
        if not self._came:
            return self.x
        self.slots.commit()
        total = self.slots.total if self.form == "dual" else self.sum.value()
        xp = array_namespace(self.x)
        return xp.astype(total / self.normaliser(), self.x.dtype)
