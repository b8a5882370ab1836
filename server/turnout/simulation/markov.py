"""Markov participation: clients that stay for a while and stay away for a while (FedAU, arXiv 2306.03401)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from turnout.simulation.participation import ROUND_STREAM, START_STREAM, Mask, ParticipationModel, draws
from turnout.simulation.probabilities import Probabilities, check_seed, given
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_KEPT_EVERY: Final = 64


@register("markov", kind="participation", paper="2306.03401")
class Markov(ParticipationModel):
    """Two states per client with stationary rate ``p_i``; small ``a_max`` means long stays.

    P(off to on) = ``a_max`` and P(on to off) = ``a_max (1/p_i - 1)``; where the latter exceeds 1 it becomes 1
    and P(off to on) is divided by it. The state in round 1 is on with probability ``p_i``.

    a_max
        Probability that a client which is away comes back in the next round.
    """

    def __init__(
        self,
        probabilities: Sequence[float] | Probabilities,
        a_max: float = 0.05,
        seed: int = 0,
        *,
        allow_zero: bool = False,
    ) -> None:
        super().__init__(given(probabilities, allow_zero=allow_zero))
        if not 0.0 < a_max <= 1.0:
            raise ConfigError(
                f"a_max, the probability of coming back, must be above 0 and at most 1, got {a_max:g}."
            )
        self.a_max = a_max
        self.seed = check_seed(seed)
        p = self.probabilities
        # A client with p = 0 starts off and has no way on: its ratio is infinite and 1/inf is 0.
        with np.errstate(divide="ignore"):
            leave = a_max * (1.0 / p - 1.0)
        excess = np.maximum(leave, 1.0)
        self._turn_on: Probabilities = a_max / excess
        self._turn_off: Probabilities = np.minimum(leave, 1.0)
        self._latest: tuple[int, Mask] = (1, draws(self.seed, START_STREAM).random(self.num_clients) < p)
        self._kept: dict[int, npt.NDArray[np.uint8]] = {1: np.packbits(self._latest[1])}

    @property
    def turn_on(self) -> Probabilities:
        """P(off to on) per client, after the rule for ratios above 1."""
        return self._turn_on

    @property
    def turn_off(self) -> Probabilities:
        """P(on to off) per client, after the rule for ratios above 1."""
        return self._turn_off

    def _mask(self, server_round: int) -> Mask:
        at, on = self._before(server_round)
        while at < server_round:
            at += 1
            uniform = draws(self.seed, ROUND_STREAM, at).random(self.num_clients)
            on = np.where(on, uniform >= self._turn_off, uniform < self._turn_on)
            if at % _KEPT_EVERY == 0:
                self._kept[at] = np.packbits(on)
        self._latest = (at, on)
        return on

    def _before(self, server_round: int) -> tuple[int, Mask]:
        """Return the nearest known state at or before ``server_round``: any order of asking is cheap."""
        latest = self._latest
        kept = server_round - server_round % _KEPT_EVERY
        while kept not in self._kept and kept > 1:
            kept -= _KEPT_EVERY
        kept = max(kept, 1)
        if kept <= latest[0] <= server_round:
            return latest
        return kept, np.unpackbits(self._kept[kept], count=self.num_clients).astype(np.bool_)
