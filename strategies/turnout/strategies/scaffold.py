"""SCAFFOLD: control variates against client drift.

Karimireddy et al., arXiv 1910.06378, Algorithm 1 with Option II for the control variates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import unused
from turnout.strategies.exact_sum import ExactSum
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import ReplyRejected, keys, register


@register("scaffold", "strategy", "1910.06378")
@dataclass(kw_only=True)
class Scaffold(StreamingStrategy):
    """Clients correct each local step by ``c - c_i`` and send the change of c_i beside their model.

    ``x <- x + eta * mean over S of Delta_i``; ``c <- c + (1/N) sum over S of (c_i_new - c_i)``.
    """

    state_names: ClassVar[tuple[str, ...]] = ("control",)
    local_updates: ClassVar[tuple[str, ...]] = ("scaffold",)

    def __post_init__(self) -> None:
        super().__post_init__()
        unused("SCAFFOLD", "client_weights", self.client_weights, "uniform")

    def setup(self) -> None:
        """Start with c = 0."""
        xp = array_namespace(self.x)
        self.control = xp.zeros_like(self.x)
        self._change = ExactSum(self.x)

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self._change.reset()
        self._came = 0

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Send c to everyone."""
        vectors = {keys.CONTROL: self.control}
        instruction = Instruction("scaffold", vectors=vectors, extras=(keys.CONTROL,))
        return dict.fromkeys(available, instruction)

    def check(self, reply: Reply) -> None:
        """Refuse a reply without the change of its control variate."""
        if keys.CONTROL not in reply.vectors:
            raise ReplyRejected("wrong-layout", f"record {keys.CONTROL!r} is missing; SCAFFOLD needs it.")

    def fold(self, reply: Reply) -> float:
        """Add the update and the change of the control variate."""
        self.sum.add(reply.update, largest=reply.peak)
        self._change.add(reply.vectors[keys.CONTROL])
        self._came += 1
        return 1.0

    def normaliser(self) -> float:
        """Return |S|."""
        return float(self._came)

    def finish(self, server_round: int) -> Any:
        """Step along the mean update and move c; nobody came: nothing moves."""
        if not self._came:
            return self.x
        xp = array_namespace(self.x)
        moved = self.control + self._change.value() / len(self.clients)
        self.control = xp.astype(moved, self.x.dtype)
        return self.step(self.sum.drain(self._came))
