"""Softmax regression of a whole cohort at once in NumPy: the clients of FedAU's study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from turnout.reproduce.drive import Sent
from turnout.strategies.rounds import Instruction
from turnout.wire import NDArray


@dataclass(frozen=True)
class Mixture:
    """The examples of all clients in one block: client i has rows ``first[i]`` to ``first[i] + sizes[i]``.

    Inputs have a last column of ones, shape (n, features); targets are one-hot, shape (n, classes).
    """

    inputs: NDArray
    targets: NDArray
    first: NDArray
    sizes: NDArray
    test_inputs: NDArray
    test_labels: NDArray
    label_distribution: NDArray

    @classmethod
    def draw(cls, *, num_clients: int, train: int, test: int, seed: int) -> Mixture:
        """Return the data of the task ``gaussian-mixture`` with FedAU's partition."""
        from turnout.tasks import GaussianMixture

        task = GaussianMixture(num_clients=num_clients, train_examples=train, test_examples=test, seed=seed)
        parts = [task.client_data(client) for client in range(num_clients)]
        labels = np.concatenate([part.y.numpy() for part in parts])
        sizes = np.array([len(part.y) for part in parts])
        held_out = task.test_data()
        return cls(
            inputs=_with_ones(np.concatenate([part.x.numpy() for part in parts])),
            targets=np.eye(task.classes)[labels],
            first=np.cumsum(sizes) - sizes,
            sizes=sizes,
            test_inputs=_with_ones(held_out.x.numpy()),
            test_labels=held_out.y.numpy(),
            label_distribution=task.label_distribution(),
        )

    @property
    def start(self) -> NDArray:
        """The model of zeros, shape (features * classes,)."""
        return np.zeros(self.inputs.shape[1] * self.targets.shape[1])

    def accuracy(self, model: NDArray) -> float:
        """Return the share of test examples that ``model`` gets right."""
        scores = self.test_inputs @ model.reshape(self.inputs.shape[1], -1)
        return float(np.mean(scores.argmax(axis=1) == self.test_labels))


@dataclass(frozen=True)
class SoftmaxClients:
    """Plain SGD: minibatches drawn with replacement, the same for every strategy in a round."""

    data: Mixture
    learning_rate: float
    steps: int
    batch: int
    seed: int

    def work(self, server_round: int, received: NDArray, cohort: Mapping[int, Instruction]) -> list[Sent]:
        """Return what the cohort sends; nobody in it is without examples."""
        clients = list(cohort)
        return [Sent(clients, self.models(server_round, received, clients))]

    def models(self, server_round: int, received: NDArray, clients: list[int]) -> NDArray:
        """Return the clients' models after their local steps, shape (clients, P)."""
        data = self.data
        uniform = np.random.default_rng([self.seed, server_round]).random(
            (len(data.sizes), self.steps, self.batch)
        )[clients]
        rows = data.first[clients, None, None] + (uniform * data.sizes[clients, None, None]).astype(np.int64)
        weights = np.tile(received.reshape(1, data.inputs.shape[1], -1), (len(clients), 1, 1))
        for step in range(self.steps):
            inputs = data.inputs[rows[:, step]]
            scores = inputs @ weights
            scores -= scores.max(axis=2, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=2, keepdims=True)
            scores -= data.targets[rows[:, step]]
            weights -= (self.learning_rate / self.batch) * (inputs.transpose(0, 2, 1) @ scores)
        return weights.reshape(len(clients), -1)


def _with_ones(inputs: NDArray) -> NDArray:
    return np.hstack([inputs.astype(np.float64), np.ones((len(inputs), 1))])
