"""Federated hyper-representation: one shared representation, a head of its own for each client."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from turnout.tasks.bilevel import Batch, BilevelTask
from turnout.tasks.classification import Examples, ImageTask, split_examples
from turnout.tasks.digits import load_digits
from turnout.tasks.mnist5k import load_mnist5k
from turnout.tasks.partition import Partitioner
from turnout.tasks.task import ClientData
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

Source = Literal["digits", "mnist5k"]
_FIT_STEPS: Final = 300
SOURCES: Final = {"digits": (load_digits, 8, 16.0), "mnist5k": (load_mnist5k, 28, 255.0)}


def load_source(data: str) -> tuple[Examples, int, float]:
    """Return the examples called ``data``, the side of their images and the largest grey value."""
    if data not in SOURCES:
        raise unknown_name("data", data, SOURCES)
    load, side, scale = SOURCES[data]
    return load(), side, scale


@register(
    "hyper-representation",
    kind="task",
    paper="2401.09587",
    summary="Bilevel: a shared representation under personal heads (digits or MNIST-5k)",
)
class HyperRepresentation(BilevelTask, ImageTask):
    """Upper level: the representation, which travels. Lower level: each client's linear head, which does not.

    Every client sees the classes under numbers of its own (a seeded permutation of the labels), so that no
    one head fits all: only a representation can be shared. Half of a client's examples train its head, the
    other half judge the representation. The server evaluates with one head per client, fitted to a few test
    examples and judged on all others: ``accuracy`` and ``loss`` of a new client with few examples.

    data
        ``"digits"`` (8x8) or ``"mnist5k"`` (28x28).
    features
        Width of the representation: one hidden layer of so many tanh units.
    mu
        Strength of the head's weight decay, which makes the lower problem strongly convex.
    support
        Examples that the server fits a head to when it evaluates, per client.
    """

    name = "hyper-representation"
    shared: ClassVar[Literal["upper", "lower"]] = "upper"

    def __init__(
        self,
        *,
        num_clients: int = 10,
        data: Source = "digits",
        features: int = 32,
        mu: float = 0.01,
        support: int = 20,
        partition: str | Partitioner = "iid",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        check_count("features", features, low=1)
        check_count("support", support, low=1)
        check_number("mu", mu, low=0, open_low=True)
        examples, self.side, self.scale = load_source(data)
        self.width, self.mu, self.support = features, mu, support
        train, test = split_examples(examples, 0.2, seed)
        super().__init__(
            train, test, model="softmax", num_clients=num_clients, partition=partition, seed=seed,
            partition_options=partition_options,
        )  # fmt: skip
        rng = np.random.default_rng([seed, 5])
        self._names = torch.from_numpy(np.stack([rng.permutation(self.classes) for _ in range(num_clients)]))
        self._levels: dict[int, tuple[ClientData, ClientData]] = {}

    def model(self) -> nn.Module:
        """Return a new representation: pixels to ``features`` numbers."""
        return nn.Sequential(nn.Flatten(), nn.Linear(self.side**2, self.width), nn.Tanh())

    def client_data(self, client: int) -> ClientData:
        """Return the examples that train the client's head."""
        return self._split(client)[0]

    def upper_data(self, client: int) -> ClientData:
        """Return the examples that judge the representation under the client's head."""
        return self._split(client)[1]

    def initial_own(self, client: int) -> list[Tensor]:
        """Return a head of zeros: weights (classes, features) and biases (classes,)."""
        return [torch.zeros(self.classes, self.width), torch.zeros(self.classes)]

    def upper_loss(self, model: nn.Module, own: list[Tensor], batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the head over the representation."""
        x, y = batch
        return cross_entropy(linear(model(x), own[0], own[1]), y)

    def lower_loss(self, model: nn.Module, own: list[Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return the same with ``mu/2 ||head||^2``."""
        penalty = sum((tensor.square().sum() for tensor in own), start=own[0].new_zeros(()))
        return self.upper_loss(model, own, batch) + 0.5 * self.mu * penalty

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Raise `ConfigError`: a representation has no loss without a head."""
        raise ConfigError(
            "task 'hyper-representation' is trained on two levels; use strategy.name = 'bo-rep'."
        )

    def evaluate_model(self, model: nn.Module, data: ClientData) -> dict[str, float]:
        """Return the metrics on one half of ``data`` under a head fitted to the other half."""
        cut = (len(data) + 1) // 2
        model.eval()
        with torch.no_grad():
            features = model(data.x)
        head = fit_heads(features[None, :cut], data.y[None, :cut], self.classes, self.mu)[0]
        judged = slice(cut if cut < len(data) else 0, None)
        return self.metrics(features[judged] @ head[:-1] + head[-1], data.y[judged])

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return accuracy and loss on test examples under heads fitted to ``support`` of them per client."""
        test = self.test_data()
        with torch.no_grad():
            features = self.loaded_model(arrays)(test.x)
        rows = self._support_rows(len(test))
        labels = torch.stack([names[test.y] for names in self._names])
        heads = fit_heads(features[rows], labels.gather(1, rows), self.classes, self.mu)
        outputs = features @ heads[:, :-1] + heads[:, -1:]
        judged = torch.ones_like(labels, dtype=torch.bool).scatter_(1, rows, False)
        return self.metrics(outputs[judged], labels[judged])

    def _support_rows(self, count: int) -> Tensor:
        """Return which test examples each client's head is fitted to, shape (clients, support)."""
        if self.support >= count:
            raise ConfigError(f"support={self.support} leaves none of {count} test examples; lower it.")
        rng = np.random.default_rng([self.seed, 8])
        return torch.from_numpy(
            np.stack([rng.permutation(count)[: self.support] for _ in range(self.num_clients)])
        )

    def _split(self, client: int) -> tuple[ClientData, ClientData]:
        if client not in self._levels:
            whole = super().client_data(client)
            y = self._names[client][whole.y]
            order = torch.from_numpy(np.random.default_rng([self.seed, 6, client]).permutation(len(y)))
            lower, upper = order[: (len(y) + 1) // 2], order[(len(y) + 1) // 2 :]
            # A client with a single example has it on both levels.
            upper = upper if len(upper) else lower
            self._levels[client] = (
                ClientData(whole.x[lower], y[lower]), ClientData(whole.x[upper], y[upper])
            )  # fmt: skip
        return self._levels[client]


def fit_heads(features: Tensor, labels: Tensor, classes: int, mu: float) -> Tensor:
    """Return C linear heads that minimise cross-entropy plus ``mu/2 ||head||^2``, each on its own examples.

    ``features`` (C, n, d), ``labels`` (C, n); the heads are (C, d + 1, classes), their last row the bias.
    """
    inputs = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    truth = torch.nn.functional.one_hot(labels, classes).to(inputs.dtype)
    # Cross-entropy's Hessian is at most half the inputs' second moments, and those at most their trace.
    curvature = 0.5 * inputs.square().sum(dim=(1, 2), keepdim=True) / inputs.shape[1] + mu
    heads = inputs.new_zeros(len(inputs), inputs.shape[2], classes)
    ahead = heads
    momentum = (1 - (mu / curvature).sqrt()) / (1 + (mu / curvature).sqrt())
    for _ in range(_FIT_STEPS):
        error = (inputs @ ahead).softmax(dim=-1) - truth
        gradient = inputs.mT @ error / inputs.shape[1] + mu * ahead
        stepped = ahead - gradient / curvature
        ahead = stepped + momentum * (stepped - heads)
        heads = stepped
    return heads
