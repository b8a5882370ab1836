"""Handwritten digits, 1,797 images of 8x8, inside scikit-learn (UCI; CC BY 4.0)."""

from __future__ import annotations

import gzip
from typing import Any, Final

import numpy as np

from turnout.tasks.classification import Examples, ImageTask, split_examples
from turnout.tasks.partition import Partitioner
from turnout.tasks.sources import package_file
from turnout.wire.registry import register

_SHA256: Final = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def load_digits() -> Examples:
    """Return the 1,797 digits, values 0 to 16. Raises `DataError` when scikit-learn is missing or differs."""
    path = package_file(
        "sklearn", "datasets/data/digits.csv.gz", sha256=_SHA256, install="pip install 'scikit-learn>=1.6'"
    )
    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
    return Examples(table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64))


@register("digits", kind="task", summary="Handwritten digits 8x8 (scikit-learn): the default of the default")
class Digits(ImageTask):
    """Digits 8x8 over clients, 80% train and 20% test (seeded split).

    model
        ``"mlp"`` (64-64-10), ``"softmax"`` or ``"cnn"``.
    """

    name = "digits"
    side = 8
    scale = 16.0

    def __init__(
        self,
        *,
        num_clients: int = 10,
        model: str = "mlp",
        partition: str | Partitioner = "dirichlet",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        train, test = split_examples(load_digits(), 0.2, seed)
        super().__init__(
            train,
            test,
            model=model,
            num_clients=num_clients,
            partition=partition,
            seed=seed,
            partition_options=partition_options,
        )
