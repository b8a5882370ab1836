"""Cyclic participation: clients that come on a timetable (FedAU, arXiv 2306.03401)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turnout.simulation.participation import START_STREAM, Mask, ParticipationModel, draws
from turnout.simulation.probabilities import Probabilities, check_seed, given
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register("cyclic", kind="participation", paper="2306.03401")
class Cyclic(ParticipationModel):
    """Each client is on for ``max(1, round(cycle p_i))`` rounds, then off for the rest of its cycle.

    The off period is at least one round. A client starts off and first comes on after a number of rounds
    drawn evenly from 0 to one below its off period. `rates` differs from ``probabilities`` by the rounding; a
    client with ``p_i = 1`` still misses one round in ``cycle + 1``, as in the authors' code.

    cycle
        Length of a cycle in rounds.
    """

    def __init__(
        self,
        probabilities: Sequence[float] | Probabilities,
        cycle: int = 100,
        seed: int = 0,
        *,
        allow_zero: bool = False,
    ) -> None:
        super().__init__(given(probabilities, allow_zero=allow_zero))
        if isinstance(cycle, bool) or not isinstance(cycle, (int, np.integer)) or cycle < 2:
            raise ConfigError(
                f"cycle, in rounds, must be an integer of at least 2 (one round on, one off), got {cycle!r}."
            )
        self.cycle = int(cycle)
        self.seed = check_seed(seed)
        comes = self.probabilities > 0.0
        on = np.maximum(1, np.round(self.cycle * self.probabilities).astype(np.int64)) * comes
        off = np.maximum(1, self.cycle - on)
        self._rounds_on = on
        self._period = on + off
        self._offset = draws(self.seed, START_STREAM).integers(0, off)

    @property
    def rates(self) -> Probabilities:
        """The exact long-run fraction of rounds: rounds on divided by the length of the client's cycle."""
        rates: Probabilities = self._rounds_on / self._period
        return rates

    def _mask(self, server_round: int) -> Mask:
        # Before its offset a client is off, which the modulus gives too: the offset is below its off period.
        phase = (server_round - 1 - self._offset) % self._period
        on: Mask = phase < self._rounds_on
        return on
