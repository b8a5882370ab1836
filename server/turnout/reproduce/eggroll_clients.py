"""The clients of EGGROLL's study: digits and a small perceptron, all members of a round evaluated at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord

from turnout.wire import NDArray, as_array
from turnout.wire.perturbation import Factors, NoiseSource

HIDDEN = 32


@dataclass(frozen=True)
class DigitsClients:
    """A 64-32-10 perceptron on the digits; client i has rows ``first[i]`` to ``first[i] + sizes[i]``.

    A round's minibatch is drawn with replacement, the same for every method.
    """

    x: NDArray
    y: NDArray
    first: NDArray
    sizes: NDArray
    test_x: NDArray
    test_y: NDArray
    batch: int
    seed: int

    @classmethod
    def draw(cls, *, num_clients: int, alpha: float, batch: int, seed: int) -> DigitsClients:
        """Return the clients of the task ``digits`` under a Dirichlet(alpha) partition."""
        from turnout.tasks import Digits

        task = Digits(num_clients=num_clients, alpha=alpha, seed=seed)
        parts = [task.client_data(client) for client in range(num_clients)]
        sizes = np.array([len(part.y) for part in parts])
        held_out = task.test_data()
        return cls(
            x=np.concatenate([part.x.numpy() for part in parts]).reshape(-1, 64),
            y=np.concatenate([part.y.numpy() for part in parts]),
            first=np.cumsum(sizes) - sizes,
            sizes=sizes,
            test_x=held_out.x.numpy().reshape(-1, 64),
            test_y=held_out.y.numpy(),
            batch=batch,
            seed=seed,
        )

    def start(self) -> ArrayRecord:
        """Return the initial model, uniform in +- 1 / sqrt(inputs) as PyTorch's linear layers."""
        rng, record = np.random.default_rng([self.seed, 11]), ArrayRecord()
        shapes = {"w1": (HIDDEN, 64), "b1": (HIDDEN,), "w2": (10, HIDDEN), "b2": (10,)}
        for name, shape in shapes.items():
            bound = (64 if name.endswith("1") else HIDDEN) ** -0.5
            record[name] = as_array(rng.uniform(-bound, bound, shape).astype(np.float32))
        return record

    def accuracy(self, theta: NDArray) -> float:
        """Return the share of test examples that the model ``theta`` gets right."""
        hidden = np.maximum(self.test_x @ _w1(theta).T + _b1(theta), 0.0)
        scores = hidden @ _w2(theta).T + _b2(theta)
        return float(np.mean(scores.argmax(axis=1) == self.test_y))

    def batches(self, server_round: int, step: int = 0) -> tuple[NDArray, NDArray]:
        """Return every client's minibatch: (clients, batch, 64) and (clients, batch)."""
        uniform = np.random.default_rng([self.seed, server_round, step]).random((len(self.sizes), self.batch))
        rows = self.first[:, None] + (uniform * self.sizes[:, None]).astype(np.int64)
        return self.x[rows], self.y[rows]

    def differences(
        self,
        server_round: int,
        theta: NDArray,
        source: NoiseSource,
        first_pairs: Sequence[int],
        pairs: int,
        sigma: float,
    ) -> NDArray:
        """Return ``d_kj`` of each client's pairs, shape (clients, pairs), float32.

        ``first_pairs`` are all the same (every client evaluates the same pairs) or all different.
        """
        x, y = self.batches(server_round)
        if len(set(first_pairs)) == 1:  # One product of every member with every client's batch.
            noise = _noise(source, server_round, range(first_pairs[0], first_pairs[0] + pairs))
            values = _losses(theta, noise, sigma, x.reshape(1, -1, 64), y.reshape(1, -1))
            losses = values.reshape(2, pairs, len(x), -1).mean(axis=3).transpose(0, 2, 1)
        else:
            losses = np.empty((2, len(x), pairs))
            for client, first in enumerate(first_pairs):
                noise = _noise(source, server_round, range(first, first + pairs))
                values = _losses(theta, noise, sigma, x[client : client + 1], y[client : client + 1])
                losses[:, client] = values.mean(axis=2)
        differences: NDArray = (losses[1] - losses[0]).astype(np.float32)
        return differences

    def descend(self, lr: float, steps: int, server_round: int, received: NDArray) -> NDArray:
        """Return the clients' models after ``steps`` steps of SGD from ``received``, shape (clients, P)."""
        models = np.repeat(received[None].astype(np.float32), len(self.sizes), axis=0)
        for step in range(steps):
            models -= np.float32(lr) * _gradients(models, *self.batches(server_round, step))
        return models


_CUTS = np.cumsum([0, HIDDEN * 64, HIDDEN, 10 * HIDDEN, 10])


def _w1(theta: NDArray) -> NDArray:
    return theta[..., : _CUTS[1]].reshape(*theta.shape[:-1], HIDDEN, 64)


def _b1(theta: NDArray) -> NDArray:
    return theta[..., _CUTS[1] : _CUTS[2]]


def _w2(theta: NDArray) -> NDArray:
    return theta[..., _CUTS[2] : _CUTS[3]].reshape(*theta.shape[:-1], 10, HIDDEN)


def _b2(theta: NDArray) -> NDArray:
    return theta[..., _CUTS[3] :]


def _noise(source: NoiseSource, server_round: int, pairs: range) -> NDArray:
    """Return the perturbations of ``pairs`` as vectors, shape (pairs, P), float32."""
    drawn = [source.draw(server_round, pair) for pair in pairs]
    pieces = []
    for i in range(len(source.tensors)):
        draws = [one[i] for one in drawn]
        if isinstance(draws[0], Factors):
            a = np.stack([draw.a for draw in draws if isinstance(draw, Factors)])
            b = np.stack([draw.b for draw in draws if isinstance(draw, Factors)])
            pieces.append((a @ b.transpose(0, 2, 1)).reshape(len(pairs), -1) * np.float32(source.rank**-0.5))
        else:
            pieces.append(np.stack([draw for draw in draws if isinstance(draw, np.ndarray)]))
    return np.concatenate(pieces, axis=1)


def _losses(theta: NDArray, noise: NDArray, sigma: float, x: NDArray, y: NDArray) -> NDArray:
    """Return every member's cross-entropies, shape (2, pairs, examples): plus, then minus."""
    step = np.float32(sigma) * noise
    members = np.concatenate([theta + step, theta - step])
    hidden = x @ _w1(members).transpose(0, 2, 1)
    hidden += _b1(members)[:, None]
    np.maximum(hidden, 0.0, out=hidden)
    scores = hidden @ _w2(members).transpose(0, 2, 1)
    scores += _b2(members)[:, None]
    scores -= scores.max(axis=2, keepdims=True)
    right = np.take_along_axis(scores, np.broadcast_to(y[..., None], (*scores.shape[:2], 1)), axis=2)[..., 0]
    np.exp(scores, out=scores)
    losses: NDArray = np.log(scores.sum(axis=2)) - right
    return losses.reshape(2, len(noise), -1)


def _gradients(models: NDArray, x: NDArray, y: NDArray) -> NDArray:
    """Return the gradients of the clients' mean losses, shape (clients, P)."""
    w2 = _w2(models)
    hidden = np.maximum(x @ _w1(models).transpose(0, 2, 1) + _b1(models)[:, None], 0.0)
    scores = hidden @ w2.transpose(0, 2, 1) + _b2(models)[:, None]
    scores -= scores.max(axis=2, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=2, keepdims=True)
    np.put_along_axis(scores, y[..., None], np.take_along_axis(scores, y[..., None], axis=2) - 1.0, axis=2)
    scores /= x.shape[1]
    back = (scores @ w2) * (hidden > 0.0)
    parts = (
        back.transpose(0, 2, 1) @ x,
        back.sum(axis=1),
        scores.transpose(0, 2, 1) @ hidden,
        scores.sum(axis=1),
    )
    return np.concatenate([part.reshape(len(x), -1) for part in parts], axis=1)
