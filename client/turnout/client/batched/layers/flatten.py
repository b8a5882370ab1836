"""Flattening of each example."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from turnout.client.batched.layers.layer import Layer, Target


class Flatten(Layer):
    """(a, w, ...) to (a, w, F)."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return ``x`` with one dimension for each example."""
        self._shape = tuple(x.shape)
        return x.flatten(2)

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return ``d`` in the input's shape."""
        return d.view(self._shape)
