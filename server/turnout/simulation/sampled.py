"""Sampled participation: a cohort of fixed size drawn anew each round, as a server with many clients does."""

from __future__ import annotations

from typing import Any

import numpy as np

from turnout.simulation.participation import ROUND_STREAM, Clients, Mask, ParticipationModel, draws
from turnout.simulation.probabilities import check_num_clients, check_seed
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register("sampled", kind="participation", paper="1602.05629")
class Sampled(ParticipationModel):
    """``clients_per_round`` of ``num_clients`` clients, uniformly without replacement, each round anew.

    A round costs work and memory for its cohort only, however many clients there are. `rates` are all
    ``clients_per_round / num_clients``.

    clients_per_round
        Clients that take part in each round.
    """

    def __init__(self, num_clients: int, clients_per_round: int, seed: int = 0) -> None:
        total, cohort = check_num_clients(num_clients), _check_cohort(clients_per_round)
        if cohort > total:
            raise ConfigError(
                f"clients_per_round={cohort}, but there are num_clients={total} clients; lower it to that."
            )
        super().__init__(np.broadcast_to(np.float64(cohort / total), total))
        self.clients_per_round = cohort
        self.seed = check_seed(seed)

    def _present(self, server_round: int) -> Clients:
        generator = draws(self.seed, ROUND_STREAM, server_round)
        # They are sorted, so their order need not be random as well.
        cohort = generator.choice(self.num_clients, self.clients_per_round, replace=False, shuffle=False)
        return np.sort(cohort)

    def _mask(self, server_round: int) -> Mask:
        mask = np.zeros(self.num_clients, np.bool_)
        mask[self._present(server_round)] = True
        return mask


def _check_cohort(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(f"clients_per_round must be an integer of at least 1, got {value!r}.")
    return int(value)
