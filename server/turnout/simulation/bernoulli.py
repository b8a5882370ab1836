"""Bernoulli participation: independent coins, the first model of FedAU (arXiv 2306.03401, section 6)."""

from __future__ import annotations

from collections.abc import Sequence

from turnout.simulation.participation import ROUND_STREAM, Mask, ParticipationModel, draws
from turnout.simulation.probabilities import Probabilities, check_seed, given
from turnout.wire.registry import register


@register("bernoulli", kind="participation", paper="2306.03401")
class Bernoulli(ParticipationModel):
    """Each client takes part with its own probability, independently of other clients and rounds.

    Probabilities are checked as by `given`; ``allow_zero`` permits clients that never come.
    """

    def __init__(
        self, probabilities: Sequence[float] | Probabilities, seed: int = 0, *, allow_zero: bool = False
    ) -> None:
        super().__init__(given(probabilities, allow_zero=allow_zero))
        self.seed = check_seed(seed)

    def _mask(self, server_round: int) -> Mask:
        uniform = draws(self.seed, ROUND_STREAM, server_round).random(self.num_clients)
        return uniform < self.probabilities
