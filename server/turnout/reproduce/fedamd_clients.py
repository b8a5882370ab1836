"""The clients of FedAMD's study, a cohort at once in NumPy: anchors, miners, plain SGD and SCAFFOLD."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from turnout.reproduce.drive import Sent
from turnout.strategies.rounds import Instruction
from turnout.wire import NDArray, keys

SPREAD: Final = 2.0
START: Final = 1.0
LEARNING_RATE: Final = 0.03
LOCAL_STEPS: Final = 10
LARGE_BATCH: Final = 50


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a small-batch gradient: everywhere, and per unit of distance to the centre."""

    constant: float
    growing: float


QUIET: Final = Noise(0.0, 0.0)
CANCELLING: Final = Noise(1.0, 0.0)
GROWING: Final = Noise(1.0, 0.5)


class Quadratics:
    """The clients; every strategy meets the same participants and clients draw the same noise in a round."""

    def __init__(self, num_clients: int, participants: int, dimension: int, noise: Noise, seed: int) -> None:
        rng = np.random.default_rng([seed, 0])
        m, d = num_clients, dimension
        factors = rng.standard_normal((m, d, d))
        self.hessians = factors @ factors.transpose(0, 2, 1) / d + np.eye(d) / 2
        self.centres = SPREAD * rng.standard_normal((m, d))
        self._mean_hessian = self.hessians.mean(axis=0)
        pulls = np.einsum("mij,mj->mi", self.hessians, self.centres)
        self.optimum = np.linalg.solve(self._mean_hessian, pulls.mean(axis=0))
        self.start = np.full(d, START)
        self._participants, self._noise, self._seed = participants, noise, seed
        self.controls = np.zeros((m, d))
        self.gradients = self.uploads = 0

    def excess(self, x: NDArray) -> float:
        """Return ``F(x) - F*``."""
        gap = x - self.optimum
        return float(gap @ self._mean_hessian @ gap) / 2

    def present(self, server_round: int) -> list[int]:
        """Return the participants, drawn uniformly without replacement."""
        rng = np.random.default_rng([self._seed, 1, server_round])
        drawn: list[int] = rng.choice(len(self.controls), self._participants, replace=False).tolist()
        return sorted(drawn)

    def draws(self, server_round: int, clients: Sequence[int]) -> NDArray:
        """Return standard normal draws of shape (LOCAL_STEPS, 2, clients, d), client by client its own."""
        rng = np.random.default_rng([self._seed, 2, server_round])
        shape = (LOCAL_STEPS, 2, *self.centres.shape)
        drawn: NDArray = rng.standard_normal(shape)[:, :, list(clients)]
        return drawn

    def gradient(self, clients: Sequence[int], y: NDArray, draw: NDArray) -> NDArray:
        """Return gradients at ``y`` (clients, d) with the noise that ``draw`` (2, clients, d) gives."""
        chosen = list(clients)
        gap = y - self.centres[chosen]
        exact = np.matmul(self.hessians[chosen], gap[:, :, None])[:, :, 0]
        noisy: NDArray = exact + self._noise.constant * draw[0] + self._noise.growing * draw[1] * gap
        return noisy

    def anchor(self, server_round: int, x: NDArray, clients: Sequence[int]) -> NDArray:
        """Return large-batch gradients at the global model ``x``."""
        draw = self.draws(server_round, clients)[0] / np.sqrt(LARGE_BATCH)
        return self.gradient(clients, np.broadcast_to(x, (len(clients), x.size)), draw)

    def mined(self, server_round: int, x: NDArray, bullseye: NDArray, clients: Sequence[int]) -> NDArray:
        """Return the miners' models after their variance-reduced steps from ``bullseye``."""
        draws = self.draws(server_round, clients)
        previous = y = np.tile(x, (len(clients), 1))
        q = np.tile(bullseye, (len(clients), 1))
        for draw in draws:
            q = q - self.gradient(clients, previous, draw) + self.gradient(clients, y, draw)
            previous, y = y, y - LEARNING_RATE * q
        return y

    def trained(
        self, server_round: int, x: NDArray, clients: Sequence[int], correction: NDArray | float = 0.0
    ) -> tuple[NDArray, NDArray]:
        """Return the models after plain local steps, and the mean of the gradients on the way."""
        y = np.tile(x, (len(clients), 1))
        total = np.zeros_like(y)
        for draw in self.draws(server_round, clients):
            gradient = self.gradient(clients, y, draw)
            total += gradient
            y = y - LEARNING_RATE * (gradient + correction)
        return y, total / LOCAL_STEPS


def work(
    problem: Quadratics, server_round: int, received: NDArray, cohort: Mapping[int, Instruction]
) -> Iterator[Sent]:
    """Yield what anchors, miners and FedAvg's clients send, and count what it costs."""
    for role in ("anchor", "miner", "sgd"):
        clients = [client for client, told in cohort.items() if told.local_update == role]
        if not clients:
            continue
        problem.uploads += len(clients)
        if role == "anchor":
            problem.gradients += LARGE_BATCH * len(clients)
            yield Sent(clients, problem.anchor(server_round, received, clients))
        elif role == "miner":
            # The first correction is exactly zero and needs no gradient.
            problem.gradients += 2 * (LOCAL_STEPS - 1) * len(clients)
            bullseye = cohort[clients[0]].vectors[keys.BULLSEYE]
            yield Sent(clients, problem.mined(server_round, received, bullseye, clients))
        else:
            problem.gradients += LOCAL_STEPS * len(clients)
            yield Sent(clients, problem.trained(server_round, received, clients)[0])


def scaffold_work(
    problem: Quadratics, server_round: int, received: NDArray, cohort: Mapping[int, Instruction]
) -> Iterator[Sent]:
    """Yield what SCAFFOLD's clients send (arXiv 1910.06378, Option II), and count what it costs.

    In round 1 they set c_i to a large-batch gradient at the initial model and leave the model as it is.
    """
    clients = list(cohort)
    if server_round == 1:
        change = problem.anchor(server_round, received, clients)
        problem.gradients += LARGE_BATCH * len(clients)
        problem.uploads += len(clients)
        models = np.tile(received, (len(clients), 1))
    else:
        correction = cohort[clients[0]].vectors[keys.CONTROL] - problem.controls[clients]
        models, means = problem.trained(server_round, received, clients, correction)
        change = means - problem.controls[clients]
        problem.gradients += LOCAL_STEPS * len(clients)
        problem.uploads += 2 * len(clients)
    problem.controls[clients] += change
    yield Sent(clients, models, change)
