"""Federated data hyper-cleaning: one shared classifier, a weight of its own for each noisy example."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.tasks.bilevel import Batch, BilevelTask
from turnout.tasks.classification import Examples, ImageTask, split_examples
from turnout.tasks.hyper_representation import Source, load_source
from turnout.tasks.label_noise import plant_wrong_labels
from turnout.tasks.partition import Partitioner
from turnout.tasks.task import ClientData, Vector
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register(
    "hyper-cleaning",
    kind="task",
    paper="2401.09587",
    summary="Bilevel: weights of training examples with wrong labels, judged by clean ones",
)
class HyperCleaning(BilevelTask, ImageTask):
    """Shared lower level: softmax regression. Upper level, each client's own: one logit per training example.

    g is the cross-entropy of the training examples, each weighted by the sigmoid of its logit, plus
    ``lam/2 ||y||^2``; f the plain cross-entropy on the client's few clean validation examples.

    data
        ``"digits"`` (8x8) or ``"mnist5k"`` (28x28).
    train_examples
        Training examples in all, over all clients.
    validation_examples
        Clean examples in all, dealt out evenly: what the cleaning has to go by.
    corrupted
        Share of the training examples whose label is replaced by another class.
    lam
        Strength of the classifier's weight decay.
    """

    name = "hyper-cleaning"
    shared: ClassVar[Literal["upper", "lower"]] = "lower"

    def __init__(
        self,
        *,
        num_clients: int = 5,
        data: Source = "digits",
        train_examples: int = 500,
        validation_examples: int = 150,
        corrupted: float = 0.4,
        lam: float = 0.01,
        partition: str | Partitioner = "iid",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        check_count("train_examples", train_examples, low=num_clients)
        check_count("validation_examples", validation_examples, low=num_clients)
        check_number("lam", lam, low=0, open_low=True)
        examples, self.side, self.scale = load_source(data)
        self.lam = lam
        pool, test = split_examples(examples, 0.2, seed)
        if train_examples + validation_examples > len(pool.labels):
            raise ConfigError(
                f"train_examples={train_examples} and validation_examples={validation_examples} are more "
                f"than the {len(pool.labels)} examples of {data!r}; lower one of them."
            )
        train = pool.take(np.arange(train_examples))
        noisy = plant_wrong_labels(train.labels, corrupted, self.classes, seed)
        self._wrong = noisy.wrong
        self._validation = pool.take(np.arange(train_examples, train_examples + validation_examples))
        super().__init__(
            Examples(train.x, noisy.labels), test, model="softmax", num_clients=num_clients,
            partition=partition, seed=seed, partition_options=partition_options,
        )  # fmt: skip
        self._upper: dict[int, ClientData] = {}

    def upper_data(self, client: int) -> ClientData:
        """Return the client's clean validation examples."""
        if client not in self._upper:
            rows = np.array_split(np.arange(len(self._validation.labels)), self.num_clients)[client]
            labels = torch.from_numpy(self._validation.labels[rows])
            self._upper[client] = ClientData(self.features(self._validation.x[rows]), labels)
        return self._upper[client]

    def wrong(self, client: int) -> Vector:
        """Return which of the client's training labels are wrong, shape (n,): for judging, not training."""
        mask: Vector = self._wrong[self.partition.indices[client]]
        return mask

    def initial_own(self, client: int) -> list[Tensor]:
        """Return the logits of the client's examples, zero: every weight is one half."""
        return [torch.zeros(self.num_examples(client))]

    def upper_loss(self, model: nn.Module, own: list[Tensor], batch: Batch) -> Tensor:
        """Return the mean cross-entropy on clean examples; the weights act through the model only."""
        x, y = batch
        return cross_entropy(model(x), y)

    def lower_loss(self, model: nn.Module, own: list[Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return the weighted cross-entropy plus ``lam/2 ||y||^2``."""
        x, y = batch
        losses = cross_entropy(model(x), y, reduction="none")
        penalty = sum((p.square().sum() for p in model.parameters()), start=losses.new_zeros(()))
        return (own[0][rows].sigmoid() * losses).mean() + 0.5 * self.lam * penalty
