"""What the ADMM strategies share: a cohort drawn by the server, and first contact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from turnout.strategies.checks import number, unused, whole_number
from turnout.strategies.rounds import Instruction, Scalar
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import ConfigError, keys


@dataclass(kw_only=True)
class ScheduledADMM(StreamingStrategy):
    """Base of the ADMM strategies.

    rho
        Penalty of the augmented Lagrangian; keep it well below the losses' curvature on noisy links.
    clients_per_round
        How many clients the server schedules, uniformly without replacement; None takes all available.
    """

    rho: float = 1.0
    clients_per_round: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("rho", self.rho, "a positive number", above=0.0)
        m = self.clients_per_round
        whole_number("clients_per_round", m, 1, optional=True)
        if m is not None and self.num_clients is not None and m > self.num_clients:
            raise ConfigError(f"clients_per_round={m} is more than num_clients={self.num_clients}; lower it.")
        unused("ADMM", "server_lr", self.server_lr, 1.0)
        unused("ADMM", "client_weights", self.client_weights, "uniform")

    def setup(self) -> None:
        """Remember w_0, which a client's first local solve starts from."""
        self.initial = self._before = self.x

    def begin_round(self, server_round: int, registered: Iterable[int]) -> None:
        """Open a round."""
        super().begin_round(server_round, registered)
        m, known = self.clients_per_round, len(self.clients)
        if m is not None and m > known and not self.clients.growing:
            raise ConfigError(f"clients_per_round={m}, but only {known} clients are registered; lower it.")
        self._came = 0
        self._before = self.x

    def schedule(self, server_round: int, available: Sequence[int], *, everyone: bool) -> list[int]:
        """Return the scheduled nodes, drawn over the clients' rows so that node ids do not matter."""
        nodes = sorted(available, key=self.clients.row_of_node)
        if everyone or self.clients_per_round is None or self.clients_per_round >= len(nodes):
            return nodes
        chosen = self.rng(server_round).choice(len(nodes), self.clients_per_round, replace=False)
        return [nodes[i] for i in sorted(chosen.tolist())]

    def instructions(
        self, nodes: Iterable[int], local_update: str, config: dict[str, Scalar]
    ) -> dict[int, Instruction]:
        """Ask ``nodes`` for an ADMM update; those never heard of also get w_0."""
        entries: dict[str, Scalar] = {keys.RHO: self.rho, **config}
        known = Instruction(local_update, entries, reply="model")
        new = Instruction(local_update, entries, {keys.INITIAL: self.initial}, reply="model")
        clients = self.clients
        return {n: known if clients.last_seen(clients.row_of_node(n)) else new for n in nodes}

    def diagnostics(self) -> dict[str, float]:
        """RMS change of the consensus model in this round: the primal residual at the server."""
        difference = np.asarray(self.x, np.float64) - np.asarray(self._before, np.float64)
        return {"primal-residual": float(np.sqrt(np.mean(difference * difference)))}
