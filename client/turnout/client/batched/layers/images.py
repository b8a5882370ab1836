"""Images between a data set's layout, channels first, and the layers', channels last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from turnout.client.batched.layers.layer import Layer, Target
from turnout.client.batched.workspace import Workspace


class ChannelsLast(Layer):
    """(a, w, C, H, W) to (a, w, H, W, C), before the first layer with parameters."""

    def __init__(self, space: Workspace) -> None:
        self._space = space

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``x`` with channels last; one channel needs no copy."""
        a, w, channels, height, width = x.shape
        if channels == 1:
            return x.view(a, w, height, width, 1)
        return self._space.get("images", a, w, height, width, channels).copy_(x.permute(0, 1, 3, 4, 2))

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return ``d``: nobody asks for the gradient of the data."""
        return d


class FlattenImages(Layer):
    """(a, w, H, W, C) to (a, w, C * H * W), in the order of channels-first images."""

    def __init__(self, name: str, space: Workspace) -> None:
        self._name, self._space = name, space
        self._shape = torch.Size()

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return each image as one row."""
        self._shape = x.shape
        a, w, height, width, channels = x.shape
        flat = self._space.get(f"{self._name}flat", a, w, channels, height, width)
        return flat.copy_(x.permute(0, 1, 4, 2, 3)).flatten(2)

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return ``d`` as images."""
        a, w, height, width, channels = self._shape
        images = self._space.get(f"{self._name}images", *self._shape)
        return images.copy_(d.view(a, w, channels, height, width).permute(0, 1, 3, 4, 2))


class MaxPool(Layer):
    """A ``MaxPool2d`` on images with channels last; clients do not matter to it."""

    def __init__(self, kernel: list[int], stride: list[int], padding: list[int]) -> None:
        self._settings = (kernel, stride, padding, [1, 1], False)
        self._x = self._indices = torch.empty(0)

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the pooled images."""
        self._x = x.flatten(0, 1).permute(0, 3, 1, 2)
        y: Tensor
        y, self._indices = torch.ops.aten.max_pool2d_with_indices(self._x, *self._settings)
        return y.permute(0, 2, 3, 1).view(*x.shape[:2], *y.shape[2:], y.shape[1])

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return each number at the place of the maximum it belongs to."""
        dx: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            d.flatten(0, 1).permute(0, 3, 1, 2), self._x, *self._settings, self._indices
        )
        return dx.permute(0, 2, 3, 1).view(*d.shape[:2], *dx.shape[2:], dx.shape[1])
