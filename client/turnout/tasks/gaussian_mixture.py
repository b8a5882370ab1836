"""A 10-class Gaussian mixture in 20 dimensions: the small study of FedAU (arXiv 2306.03401)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from torch import nn

from turnout.tasks.classification import ClassificationTask, Examples
from turnout.tasks.partition import Partitioner
from turnout.tasks.validation import check_count
from turnout.wire.registry import register

_SPREAD: Final = 2.2
_NOISE: Final = 0.8


@register(
    "gaussian-mixture", kind="task", paper="2306.03401", summary="FedAU's small study: softmax, 10 classes"
)
class GaussianMixture(ClassificationTask):
    """Softmax regression on ten Gaussian classes with unequal label mixes; clients may have no data.

    Class means are N(0, I) * 2.2 / sqrt(dimension), the noise has standard deviation 0.8, labels are
    uniform. The default partition is FedAU's ``label-mix`` with alpha 0.1.

    dimension
        Number of features.
    train_examples, test_examples
        Size of each set.
    """

    name = "gaussian-mixture"

    def __init__(
        self,
        *,
        num_clients: int = 50,
        dimension: int = 20,
        train_examples: int = 4000,
        test_examples: int = 2000,
        partition: str | Partitioner = "label-mix",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        for field, count in (
            ("dimension", dimension),
            ("train_examples", train_examples),
            ("test_examples", test_examples),
        ):
            check_count(field, count, low=1)
        self._dimension = dimension
        rng = np.random.default_rng([seed, 0])
        means = rng.standard_normal((self.classes, dimension)) * (_SPREAD / np.sqrt(dimension))
        parts = []
        for count in (train_examples, test_examples):
            labels = rng.integers(self.classes, size=count)
            x = means[labels] + _NOISE * rng.standard_normal((count, dimension))
            parts.append(Examples(x.astype(np.float32), labels))
        super().__init__(
            parts[0],
            parts[1],
            num_clients=num_clients,
            partition=partition,
            seed=seed,
            partition_options=partition_options,
        )

    def model(self) -> nn.Module:
        """Return softmax regression."""
        return nn.Linear(self._dimension, self.classes)
