"""Who takes part in which round: the one interface that decides a client's availability."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import numpy as np
import numpy.typing as npt

from turnout.simulation.probabilities import Probabilities, check_num_clients
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

Mask = npt.NDArray[np.bool_]
"""Who takes part in a round, shape (num_clients,)."""
Clients = npt.NDArray[np.int64]
"""Numbers of clients in ascending order, shape (cohort,)."""

# Spawn keys of SeedSequence: they keep these draws apart from everything else seeded by the same number.
START_STREAM: Final = 0x7475726E
ROUND_STREAM: Final = 0x6F757400


class ParticipationModel(ABC):
    """Decides, for each round, which of ``num_clients`` clients take part.

    A mask is a pure function of the model's settings, its seed and the round: it does not matter which rounds
    were asked for before, so a resumed run, a simulated and a live federation all see the same participation.

    probabilities
        p_i, how often each client takes part in the long run: one number for all, a list, or a rule.
    seed
        Seeds who comes when; the run's seed unless it is given.
    """

    def __init__(self, probabilities: Probabilities) -> None:
        self._probabilities = probabilities

    @property
    def num_clients(self) -> int:
        """Number of clients N."""
        return int(self._probabilities.size)

    @property
    def probabilities(self) -> Probabilities:
        """The probabilities the model was given, shape (N,), client 0 first."""
        return self._probabilities

    @property
    def rates(self) -> Probabilities:
        """The long-run fraction of rounds in which each client takes part, shape (N,)."""
        return self._probabilities

    def mask(self, server_round: int) -> Mask:
        """Return who takes part in ``server_round``, counted from 1: a read-only bool vector of shape (N,).

        Raises `ConfigError` for a round below 1.
        """
        mask = self._mask(_valid(server_round))
        mask.flags.writeable = False
        return mask

    def present(self, server_round: int) -> Clients:
        """Return the clients that take part in ``server_round``, ascending: the mask, written as a list.

        Raises `ConfigError` for a round below 1.
        """
        return self._present(_valid(server_round))

    @abstractmethod
    def _mask(self, server_round: int) -> Mask:
        """Return the mask of a valid round; a pure function of it."""

    def _present(self, server_round: int) -> Clients:
        """Return the clients of a valid round; a model that need not look at all others says so here."""
        return np.flatnonzero(self._mask(server_round))


@register("always", kind="participation")
class Always(ParticipationModel):
    """Every client takes part in every round."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(np.ones(check_num_clients(num_clients)))

    def _mask(self, server_round: int) -> Mask:
        return np.ones(self.num_clients, dtype=np.bool_)


def _valid(server_round: int) -> int:
    if server_round < 1:
        raise ConfigError(f"server_round is {server_round}, but rounds are counted from 1.")
    return int(server_round)


def draws(seed: int, stream: int, server_round: int = 0) -> np.random.Generator:
    """Return the generator of one round's draws, the same whenever and in whatever order it is asked for."""
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, server_round)))
    )
