"""Convolutions with stride 1. Images are (a, w, height, width, channels): channels-last for each client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from turnout.client.batched.layers.layer import Layer, Target
from turnout.client.batched.workspace import Workspace

_aten: Final = torch.ops.aten


class Convolution(Layer):
    """A ``Conv2d``. One client alone on a CPU has PyTorch's own kernels, others products of their patches.

    No kernel takes a filter per client: for several, each image's patches become the rows of a matrix, and
    all clients' products are one call.
    """

    trains = True

    def __init__(self, name: str, layer: nn.Conv2d, *, pixels: int, space: Workspace) -> None:
        self._name, self._space = name, space
        self._weight = f"{name}weight"
        self._bias = f"{name}bias" if "bias" in dict(layer.named_parameters()) else None
        self._kernel = (layer.kernel_size[0], layer.kernel_size[1])
        self._padding = padding_of(layer)
        self.numbers = pixels * (layer.in_channels * math.prod(self._kernel) + layer.out_channels)
        self._x = self._patches = self._filter = torch.empty(0)

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs for ``x`` (a, w, H, W, C)."""
        self._x = x
        weight = parameters[self._weight]
        bias = None if self._bias is None else parameters[self._bias]
        if _alone(x):
            self._filter = weight[0].contiguous(memory_format=torch.channels_last)
            own_bias = None if bias is None else bias[0]
            z = torch.conv2d(x[0].permute(0, 3, 1, 2), self._filter, own_bias, padding=self._padding)
            return z.permute(0, 2, 3, 1).unsqueeze(0)
        (a, w), (height, width) = x.shape[:2], self._size(x)
        self._patches = self._unfold(x)
        filters = self._filters(weight)
        z = self._space.get(f"{self._name}z", a, w * height * width, weight.shape[1])
        if bias is None:
            torch.bmm(self._patches, filters.mT, out=z)
        else:
            torch.baddbmm(bias.unsqueeze(1), self._patches, filters.mT, out=z)
        return z.view(a, w, height, width, -1)

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return the gradient of ``x``; before the weight's goes in, which may change the weight."""
        weight = parameters[self._weight]
        if _alone(self._x):
            return self._backward_alone(d, weight, target, first)
        a, out, channels = weight.shape[:3]
        d = d.reshape(a, -1, out)
        dx = d
        if not first:
            dx = self._fold(torch.bmm(d, self._filters(weight), out=self._dpatches()))
        if channels == 1:
            place = target.tensors[self._weight].flatten(2)
            place.baddbmm_(d.mT, self._patches, beta=target.keep, alpha=target.scale)
        else:
            gradient = torch.bmm(d.mT, self._patches)
            target.add(self._weight, gradient.view(a, out, *self._kernel, channels).permute(0, 1, 4, 2, 3))
        if self._bias is not None:
            target.add(self._bias, d.sum(dim=1))
        return dx

    def _backward_alone(self, d: Tensor, weight: Tensor, target: Target, first: bool) -> Tensor:
        dx, gradient, bias = _aten.convolution_backward(
            d[0].permute(0, 3, 1, 2),
            self._x[0].permute(0, 3, 1, 2),
            self._filter,
            [weight.shape[1]],
            [1, 1],
            self._padding,
            [1, 1],
            False,
            [0, 0],
            1,
            [not first, True, self._bias is not None],
        )
        target.add(self._weight, gradient.unsqueeze(0))
        if self._bias is not None:
            target.add(self._bias, bias.unsqueeze(0))
        return d if first else dx.permute(0, 2, 3, 1).unsqueeze(0)

    def _size(self, x: Tensor) -> tuple[int, int]:
        """Return height and width of the output."""
        height, width = (x.shape[2 + i] + 2 * self._padding[i] - self._kernel[i] + 1 for i in (0, 1))
        return height, width

    def _filters(self, weight: Tensor) -> Tensor:
        """Return the filters (a, out, kh * kw * C), in the order of the patches."""
        return weight.permute(0, 1, 3, 4, 2).flatten(2)

    def _unfold(self, x: Tensor) -> Tensor:
        """Return the patches under the filter, shape (a, w * H * W, kh * kw * C)."""
        (a, w), channels, (height, width) = x.shape[:2], x.shape[4], self._size(x)
        kh, kw = self._kernel
        up, side = self._padding
        x = pad(x, (0, 0, side, side, up, up)) if up or side else x
        windows = x.unfold(2, kh, 1).unfold(3, kw, 1).permute(0, 1, 2, 3, 5, 6, 4)
        patches = self._space.get(f"{self._name}patches", a, w, height, width, kh, kw, channels)
        patches.copy_(windows)
        return patches.view(a, w * height * width, kh * kw * channels)

    def _dpatches(self) -> Tensor:
        return self._space.get(f"{self._name}dpatches", *self._patches.shape)

    def _fold(self, patches: Tensor) -> Tensor:
        """Return the sum of ``patches`` over where they were taken from, in the shape of the input."""
        a, w, h, wide, channels = self._x.shape
        (height, width), (kh, kw), (up, side) = self._size(self._x), self._kernel, self._padding
        patches = patches.view(a, w, height, width, kh, kw, channels)
        shape = (a, w, h + 2 * up, wide + 2 * side, channels)
        total = self._space.get(f"{self._name}dx", *shape).zero_()
        for i in range(kh):
            for j in range(kw):
                total[:, :, i : i + height, j : j + width].add_(patches[:, :, :, :, i, j])
        return total[:, :, up : up + h, side : side + wide]


def padding_of(layer: nn.Conv2d) -> tuple[int, int]:
    """Return the zeros on each side of an image; `ValueError` for "same" with an even kernel."""
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return 0, 0
        if layer.kernel_size[0] % 2 == 0 or layer.kernel_size[1] % 2 == 0:
            raise ValueError("an even kernel has no symmetric padding that keeps the size")
        return layer.kernel_size[0] // 2, layer.kernel_size[1] // 2
    return layer.padding[0], layer.padding[1]


def _alone(x: Tensor) -> bool:
    return len(x) == 1 and x.device.type == "cpu"
