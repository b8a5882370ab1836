"""FedProx: FedAvg whose clients are held near the global model (Li et al., arXiv 1812.06127, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from turnout.strategies.checks import number
from turnout.strategies.fedavg import FedAvg
from turnout.strategies.rounds import Instruction
from turnout.wire import keys, register


@register("fedprox", "strategy", "1812.06127")
@dataclass(kw_only=True)
class FedProx(FedAvg):
    """Clients add ``(mu / 2) ||w - x||^2`` to their loss.

    ``proximal_mu``: mu >= 0, how strongly they are held; 0 is FedAvg.
    """

    local_updates: ClassVar[tuple[str, ...]] = ("prox",)

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        number("proximal_mu", self.proximal_mu, "a number >= 0", least=0.0)

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        """Send mu to everyone."""
        instruction = Instruction("prox", {keys.PROXIMAL_MU: float(self.proximal_mu)})
        return dict.fromkeys(available, instruction)
