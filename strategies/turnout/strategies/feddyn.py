"""FedDyn: dynamic regularisation (Acar et al., arXiv 2111.04263, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import number, unused
from turnout.strategies.rounds import Instruction, Reply
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import keys, register


@register("feddyn", "strategy", "2111.04263")
@dataclass(kw_only=True)
class FedDyn(StreamingStrategy):
    """Clients minimise ``f_i(w) - <g_i, w> + (alpha / 2) ||w - x||^2``; the server corrects the mean by h.

    ``h <- h - (alpha / N) sum over S of (w_i - x)``; ``x <- mean over S of w_i - h / alpha``.
    There is no server learning rate.

    ``dyn_alpha``: the regularisation weight alpha > 0.
    """

    dyn_alpha: float = 0.1

    state_names: ClassVar[tuple[str, ...]] = ("h",)
    local_updates: ClassVar[tuple[str, ...]] = ("dyn",)

    def __post_init__(self) -> None:
        super().__post_init__()
        number("dyn_alpha", self.dyn_alpha, "a positive number", above=0.0)
        unused("FedDyn", "server_lr", self.server_lr, 1.0)
        unused("FedDyn", "client_weights", self.client_weights, "uniform")

    def setup(self) -> None:
        """Start with h = 0, kept in float64 because it integrates over rounds."""
        self.h = self.sum.value()

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        self._came = 0

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Send alpha to everyone."""
        return dict.fromkeys(available, Instruction("dyn", {keys.DYN_ALPHA: float(self.dyn_alpha)}))

    def fold(self, reply: Reply) -> float:
        """Add the update w_i - x."""
        self.sum.add(reply.update, largest=reply.peak)
        self._came += 1
        return 1.0

    def normaliser(self) -> float:
        """Return |S|."""
        return float(self._came)

    def finish(self, server_round: int) -> Any:
        """Move h, then return mean_S w_i - h / alpha; nobody came: nothing moves."""
        if not self._came:
            return self.x
        total = self.sum.value()
        self.h = self.h - self.dyn_alpha * total / len(self.clients)
        xp = array_namespace(self.x)
        return xp.astype(self.x + total / self._came - self.h / self.dyn_alpha, self.x.dtype)
