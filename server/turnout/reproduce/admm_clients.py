"""The clients of the ADMM studies, all at once in NumPy: closed-form steps on quadratics over noisy links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from turnout.reproduce.drive import Sent
from turnout.strategies.rounds import Instruction
from turnout.wire import NDArray, keys

FEDAVG_STEPS: Final = 5


@dataclass(frozen=True)
class Problem:
    """Least squares: ``J_k(w) = w' A_k w / 2 - b_k' w``, and the pooled solution."""

    curvature: NDArray
    linear: NDArray

    @property
    def solution(self) -> NDArray:
        """The minimiser of ``sum_k J_k``."""
        return np.linalg.solve(self.curvature.sum(axis=0), self.linear.sum(axis=0))

    def drift(self, rho: float, sigma: float) -> float:
        """Return the growth per round of ``E ||w_n - w*||^2`` that link noise causes without a dual."""
        inverse = np.linalg.inv(self.curvature.sum(axis=0))
        return rho**2 * len(self.linear) * 2 * sigma**2 * float(np.trace(inverse @ inverse))


def recipe(*, num_clients: int, dimension: int, min_examples: int, max_examples: int, seed: int) -> Problem:
    """Return the paper's weighted least squares, as the task ``wls`` makes it."""
    from turnout.tasks import Wls

    task = Wls(
        num_clients=num_clients,
        dimension=dimension,
        min_examples=min_examples,
        max_examples=max_examples,
        seed=seed,
    )
    parts = [task.curvature(client) for client in range(num_clients)]
    return Problem(np.stack([a for a, _ in parts]), np.stack([b for _, b in parts]))


def weak(seed: int, num_clients: int = 10, dimension: int = 4) -> Problem:
    """Return a problem whose curvature, about 0.5, is below rho: there the noise accumulates."""
    rng = np.random.default_rng([seed, 5])
    factors = rng.standard_normal((num_clients, dimension, dimension))
    curvature = factors @ factors.transpose(0, 2, 1) / (4 * dimension) + np.eye(dimension) / 4
    truth = rng.standard_normal(dimension)
    noise = 0.1 * rng.standard_normal((num_clients, dimension))
    return Problem(curvature, curvature @ truth + noise)


class Channel:
    """Additive Gaussian noise on what is transmitted: one draw per vector, by link, round and client."""

    def __init__(self, num_clients: int, dimension: int, rounds: int, *, sigma: float, seed: int) -> None:
        rng = np.random.default_rng([seed, 7])
        self._noise = sigma * rng.standard_normal((rounds, 2, num_clients, dimension))

    def down(self, server_round: int, vector: NDArray, clients: list[int]) -> NDArray:
        """Return what each client receives of the broadcast ``vector``, shape (clients, L)."""
        heard: NDArray = vector + self._noise[server_round - 1, 0, clients]
        return heard

    def up(self, server_round: int, vectors: NDArray, clients: list[int]) -> NDArray:
        """Return what the server receives of the clients' ``vectors``, shape (clients, L)."""
        received: NDArray = vectors + self._noise[server_round - 1, 1, clients]
        return received


class AdmmClients:
    """Clients with ``f_k(w) = w' A_k w / 2 - b_k' w`` and their state over rounds.

    They do what the local updates ``admm``, ``dual-admm`` and ``sgd`` of the client package do, as the
    instructions say. ``models`` are the local models w_k, shape (K, L). Clients start from w_0 = 0, which is
    known to all and not transmitted: nothing is downloaded in round 1.
    """

    def __init__(self, curvature: NDArray, linear: NDArray, rho: float, channel: Channel) -> None:
        """``curvature`` holds the A_k, shape (K, L, L), ``linear`` the b_k, shape (K, L)."""
        self._curvature, self._linear, self._rho, self._channel = curvature, linear, rho, channel
        self._inverse = np.linalg.inv(curvature + rho * np.eye(linear.shape[1]))
        # I - rho N_k = N_k A_k: how much of its own model a client keeps.
        self._keep = self._inverse @ curvature
        self._step = 1.0 / float(np.linalg.eigvalsh(curvature).max())
        self.models = _times(self._inverse, linear)
        self._duals = np.zeros_like(linear)
        self._heard = np.zeros_like(linear)

    def work(self, server_round: int, received: NDArray, cohort: Mapping[int, Instruction]) -> list[Sent]:
        """Return what the cohort sends, as the server receives it."""
        clients = list(cohort)
        told = cohort[clients[0]]
        if told.local_update == "sgd":
            models = self._descend(server_round, received, clients)
        elif told.local_update == "dual-admm":
            models = self._dual(server_round, received, clients)
        elif told.config[keys.CONTINUAL]:
            models = self._continual(server_round, received, clients)
        else:
            models = self._scheduled(server_round, received, clients, bool(told.config.get(keys.EXTRAPOLATE)))
        return [Sent(clients, self._channel.up(server_round, models, clients))]

    def _descend(self, server_round: int, received: NDArray, clients: list[int]) -> NDArray:
        """Take gradient steps from the received model (FedAvg)."""
        y = self._channel.down(server_round, received, clients)
        for _ in range(FEDAVG_STEPS):
            y = y - self._step * (_times(self._curvature[clients], y) - self._linear[clients])
        self.models[clients] = y
        return y

    def _scheduled(
        self, server_round: int, received: NDArray, clients: list[int], extrapolate: bool
    ) -> NDArray:
        """Step towards s; with ``extrapolate`` the client forms s from two received models."""
        if server_round > 1:
            heard = s = self._channel.down(server_round, received, clients)
            if extrapolate:
                s = 2 * heard - self._heard[clients]
            self._heard[clients] = heard
            self._approach(clients, s)
        return self.models[clients]

    def _continual(self, server_round: int, received: NDArray, clients: list[int]) -> NDArray:
        """Let every client step towards the last model it received; the cohort sends ``2 w_new - w_old``."""
        if server_round == 1:
            return 2 * self.models[clients]
        self._heard[clients] = self._channel.down(server_round, received, clients)
        old = self.models.copy()
        self._approach(list(range(len(old))), self._heard)
        return 2 * self.models[clients] - old[clients]

    def _dual(self, server_round: int, received: NDArray, clients: list[int]) -> NDArray:
        """Update the dual, then the primal; send ``w_k + z_k / rho``."""
        if server_round > 1:
            heard = self._channel.down(server_round, received, clients)
            self._duals[clients] += self._rho * (self.models[clients] - heard)
            target = self._linear[clients] - self._duals[clients] + self._rho * heard
            self.models[clients] = _times(self._inverse[clients], target)
        return self.models[clients] + self._duals[clients] / self._rho

    def _approach(self, clients: list[int], s: NDArray) -> None:
        """``w_k <- (I - rho N_k) w_k + rho N_k s``, written so that nothing cancels near consensus."""
        self.models[clients] = s + _times(self._keep[clients], self.models[clients] - s)


def _times(matrices: NDArray, vectors: NDArray) -> NDArray:
    product: NDArray = np.matmul(matrices, vectors[:, :, None])[:, :, 0]
    return product
