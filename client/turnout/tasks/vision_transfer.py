"""A pretrained convolutional network fine-tuned on small images: transfer with batch normalisation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from turnout.tasks.cache import announce, cached_arrays, reported
from turnout.tasks.classification import ClassificationTask, Examples, split_examples
from turnout.tasks.fashion_mnist import load_fashion_mnist
from turnout.tasks.mnist5k import load_mnist5k
from turnout.tasks.partition import Partitioner
from turnout.tasks.pretrained import efficientnet_lite0 as lite0
from turnout.tasks.validation import check_count
from turnout.wire.errors import unknown_name
from turnout.wire.registry import register

Images = Literal["mnist5k", "fashion-mnist"]
VisionModel = Literal["efficientnet-lite0", "frozen-efficientnet-lite0"]

_SMALLEST: Final = 32
_BATCH: Final = 64


@register(
    "vision-transfer", kind="task", summary="EfficientNet-Lite0 (ImageNet) on MNIST-5k or Fashion-MNIST"
)
class VisionTransfer(ClassificationTask):
    """Grey images over clients, made larger and of three equal channels, for a network that knows ImageNet.

    All of the network trains and travels, the statistics of its 49 batch normalisations included. Under
    adapters (of methods that adapt convolutions) those statistics stay ImageNet's, and the last layer trains
    whole.

    images
        ``"mnist5k"`` (4,000 train, 1,000 test, seeded split), or ``"fashion-mnist"`` (60,000 and 10,000).
    model
        ``"efficientnet-lite0"``: the network with a new last layer. ``"frozen-efficientnet-lite0"``: the last
        layer alone, on features that are computed once and kept in the cache.
    side
        Pixels a side to which the images are made larger (the network was trained at 224).
    train_examples, test_examples
        Take a seeded random part of this size of the set; by default all of it.
    data_dir
        For Fashion-MNIST, or any data set in its form: a folder of IDX files.
    """

    name = "vision-transfer"
    chunk_size = 64

    def __init__(
        self,
        *,
        num_clients: int = 10,
        images: Images = "mnist5k",
        model: VisionModel = "efficientnet-lite0",
        partition: str | Partitioner = "dirichlet",
        side: int = 64,
        train_examples: int | None = None,
        test_examples: int | None = None,
        data_dir: str | Path | None = None,
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        for field, value, known in (("images", images, Images), ("model", model, VisionModel)):
            if value not in get_args(known):
                raise unknown_name(field, value, get_args(known))
        check_count("side", side, low=_SMALLEST)
        self.model_name, self._side = model, side
        self._frozen = model == "frozen-efficientnet-lite0"
        if images == "fashion-mnist":
            train, test = load_fashion_mnist(data_dir)
        else:
            train, test = split_examples(load_mnist5k(), 0.2, seed)
        train = train.sample(train_examples, "train_examples", seed)
        test = test.sample(test_examples, "test_examples", seed)
        if self._frozen:
            train, test = (Examples(self._embedded(part.x), part.labels) for part in (train, test))
        else:
            self.modules_to_save = ("_fc",)
        super().__init__(
            train,
            test,
            num_clients=num_clients,
            partition=partition,
            seed=seed,
            partition_options=partition_options,
        )

    def model(self) -> nn.Module:
        """Return the pretrained network with a new last layer, or that layer alone."""
        return (
            nn.Linear(lite0.WIDTH, self.classes) if self._frozen else lite0.efficientnet_lite0(self.classes)
        )

    def features(self, raw: np.ndarray[Any, Any]) -> Tensor:
        """Return images, float32 (n, 3, side, side), normalised as the network was trained; or features."""
        if self._frozen:
            return torch.from_numpy(np.ascontiguousarray(raw))
        return _enlarged(raw, self._side)

    def _embedded(self, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        def make() -> dict[str, np.ndarray[Any, Any]]:
            announce(f"features of {len(raw)} images with EfficientNet-Lite0, once (about 10 ms each)")
            model = lite0.efficientnet_lite0().eval()
            features = np.empty((len(raw), lite0.WIDTH), dtype=np.float32)
            with torch.no_grad():
                for start in reported(range(0, len(raw), _BATCH), "features"):
                    rows = slice(start, start + _BATCH)
                    features[rows] = model.features(_enlarged(raw[rows], self._side)).numpy()
            return {"features": features}

        about = [lite0.SHA256, self._side, raw.shape, hashlib.sha256(raw.tobytes()).hexdigest()]
        return cached_arrays("efficientnet-lite0-features", about, make)["features"]


def _enlarged(raw: np.ndarray[Any, Any], side: int) -> Tensor:
    """Return grey byte images (n, h, w) as network inputs (n, 3, side, side)."""
    images = torch.from_numpy(raw.astype(np.float32)).unsqueeze(1)
    large = interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return ((large - lite0.MEAN) / lite0.SCALE).repeat(1, 3, 1, 1)
