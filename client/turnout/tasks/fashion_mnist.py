"""Fashion-MNIST, 70,000 images of 28x28 (Xiao et al., 2017; MIT), from IDX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from turnout.tasks.classification import Examples, ImageTask
from turnout.tasks.idx import find_idx, read_idx
from turnout.tasks.partition import Partitioner
from turnout.tasks.sources import check_sha256
from turnout.wire.errors import DataError
from turnout.wire.registry import register

_DEBIAN_FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")
_INSTALL: Final = (
    "install the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or give "
    "data_dir, a folder with the four IDX files"
)
_SHA256: Final = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def load_fashion_mnist(data_dir: str | Path | None = None) -> tuple[Examples, Examples]:
    """Return (train, test) from ``data_dir``, or from the Debian package when None.

    ``data_dir`` holds the four IDX files, gzipped or not, under MNIST's usual names; any data set in that
    form will do. The Debian package's files are checked by hash. Raises `DataError` when files are missing
    or damaged.
    """
    folder = _DEBIAN_FOLDER if data_dir is None else Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"Fashion-MNIST is not in {folder}: {_INSTALL}.")
    parts = []
    for part in ("train", "t10k"):
        paths = [find_idx(folder, f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1")]
        if data_dir is None:
            for path in paths:
                check_sha256(path, _SHA256[path.name], fix=_INSTALL)
        images, labels = (read_idx(path) for path in paths)
        if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
            raise DataError(
                f"{folder} holds {part} images of shape {images.shape} and labels of shape {labels.shape}; "
                "expected (n, side, side) and (n,)."
            )
        if labels.max(initial=0) >= FashionMnist.classes:
            raise DataError(
                f"{folder} has the {part} label {labels.max()}; expected 0 to {FashionMnist.classes - 1}."
            )
        parts.append(Examples(images, labels.astype(np.int64)))
    return parts[0], parts[1]


@register("fashion-mnist", kind="task", summary="Fashion-MNIST 70,000 (Debian package or IDX files)")
class FashionMnist(ImageTask):
    """Fashion-MNIST over clients, with its own train and test sets (60,000 and 10,000).

    model
        ``"lenet"``, ``"cnn"``, ``"mlp"`` or ``"softmax"``.
    data_dir
        A folder of IDX files; by default where the Debian package puts them.
    train_examples, test_examples
        Take a seeded random part of this size of the set; by default all of it.
    """

    name = "fashion-mnist"
    # Mean and standard deviation of the published training set, fixed.
    mean = 0.2860
    std = 0.3530

    def __init__(
        self,
        *,
        num_clients: int = 100,
        model: str = "lenet",
        partition: str | Partitioner = "dirichlet",
        data_dir: str | Path | None = None,
        train_examples: int | None = None,
        test_examples: int | None = None,
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        train, test = load_fashion_mnist(data_dir)
        self.side = train.x.shape[1]
        super().__init__(
            train.sample(train_examples, "train_examples", seed),
            test.sample(test_examples, "test_examples", seed),
            model=model,
            num_clients=num_clients,
            partition=partition,
            seed=seed,
            partition_options=partition_options,
        )
