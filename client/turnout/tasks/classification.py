"""Shared by the classification tasks: partitioned examples, accuracy, labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.tasks.losses import known_loss
from turnout.tasks.models import image_model
from turnout.tasks.partition import IntArray, Partition, Partitioner, make_partitioner, natural_count
from turnout.tasks.task import ClientData, Task, Vector
from turnout.wire.errors import ConfigError


@dataclass(frozen=True)
class Examples:
    """Raw features (n, ...) in any numeric dtype and integer labels (n,)."""

    x: np.ndarray[Any, Any]
    labels: IntArray

    def take(self, rows: IntArray) -> Examples:
        """Return the examples ``rows``."""
        return Examples(self.x[rows], self.labels[rows])

    def sample(self, count: int | None, field: str, seed: int) -> Examples:
        """Return ``count`` random examples, all when None; `ConfigError` about ``field`` if too many."""
        if count is None:
            return self
        if not 1 <= count <= len(self.labels):
            raise ConfigError(
                f"{field}={count} is not possible; use 1 to {len(self.labels)} or leave it out."
            )
        return self.take(np.random.default_rng([seed, 0]).permutation(len(self.labels))[:count])


def split_examples(examples: Examples, test_fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Return (train, test): a shuffled split drawn under ``seed``."""
    order = np.random.default_rng([seed, 0]).permutation(len(examples.labels))
    cut = len(order) - round(test_fraction * len(order))
    return examples.take(order[:cut]), examples.take(order[cut:])


class ClassificationTask(Task):
    """Cross-entropy and accuracy over partitioned examples.

    A subclass loads its data and says in `features` how raw features become float32 model inputs; that
    must use fixed constants, never statistics of pooled data. Features are converted per client on first use.

    partition
        How examples are spread over clients: a partitioner's name, whose fields follow as further options
        (``alpha=0.1``), or in Python a partitioner.
    """

    classes: int = 10

    def __init__(
        self,
        train: Examples,
        test: Examples,
        *,
        num_clients: int | None,
        partition: str | Partitioner,
        seed: int,
        partition_options: dict[str, Any],
        groups: IntArray | None = None,
    ) -> None:
        if isinstance(partition, str):
            partition = make_partitioner(partition, **partition_options)
        elif partition_options:
            raise ConfigError(
                f"partition options {sorted(partition_options)} go with a partition given by name; "
                "set them on the partitioner object instead."
            )
        if num_clients is None:
            num_clients = natural_count(partition, groups)
        self.seed = seed
        self.num_clients = num_clients
        self.partition: Partition = partition.split(train.labels, num_clients, seed=seed, groups=groups)
        self._train = train
        self._test = test
        self._clients: dict[int, ClientData] = {}
        self._test_data: ClientData | None = None

    def features(self, raw: np.ndarray[Any, Any]) -> Tensor:
        """Return model inputs, float32, for raw features of shape (n, ...)."""
        return torch.from_numpy(np.ascontiguousarray(raw, dtype=np.float32))

    def client_data(self, client: int) -> ClientData:
        """Return the training examples of ``client``, converted on first use."""
        data = self._clients.get(client)
        if data is None:
            rows = self.partition.indices[client]
            labels = torch.from_numpy(self.partition.labels[rows])
            data = self._clients[client] = ClientData(self.features(self._train.x[rows]), labels)
        return data

    def num_examples(self, client: int) -> int:
        """Return the number of training examples of ``client``."""
        return len(self.partition.indices[client])

    def test_data(self) -> ClientData:
        """Return the held-out examples, with their true labels."""
        if self._test_data is None:
            self._test_data = ClientData(self.features(self._test.x), torch.from_numpy(self._test.labels))
        return self._test_data

    @known_loss("cross-entropy")
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(output, y)

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        """Return the mean cross-entropy ("loss") and the share of right answers ("accuracy")."""
        accuracy = (output.argmax(dim=1) == y).double().mean()
        return {"loss": float(cross_entropy(output, y)), "accuracy": float(accuracy)}

    def class_counts(self) -> IntArray:
        """Return how many examples of each class each client has, shape (num_clients, classes)."""
        return self.partition.class_counts(self.classes)

    def label_distribution(self) -> Vector:
        """Return each client's share of labels, shape (num_clients, classes); zeros for one without data."""
        counts = self.class_counts()
        shares: Vector = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return shares


class ImageTask(ClassificationTask):
    """Grey square images as (n, side, side) bytes; inputs are ``(byte / scale - mean) / std``."""

    side: int = 28
    scale: float = 255.0
    mean: float = 0.0
    std: float = 1.0

    def __init__(self, train: Examples, test: Examples, *, model: str, seed: int, **settings: Any) -> None:
        self.model_name = model
        self.seeded_model(seed)  # An impossible model fails here, not in the first client.
        super().__init__(train, test, seed=seed, **settings)

    def model(self) -> nn.Module:
        """Return a new model of the kind the task was made with."""
        return image_model(self.model_name, self.side, self.classes)

    def features(self, raw: np.ndarray[Any, Any]) -> Tensor:
        """Return images of shape (n, 1, side, side), float32, normalised by the fixed constants."""
        images = raw.astype(np.float32).reshape(-1, 1, self.side, self.side)
        return torch.from_numpy((images / self.scale - self.mean) / self.std)
