"""Linear layers: batched matrix products on views of the flat parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turnout.client.batched.layers.layer import Layer, Target
from turnout.client.batched.workspace import Workspace


class Linear(Layer):
    """``x W' + b``. The output is (a, w, out), or for the ``last`` layer (a, out, w).

    The loss sums over outputs, of which there are few: on a CPU that is several times faster when the
    examples lie side by side.
    """

    trains = True

    def __init__(self, name: str, layer: nn.Linear, *, last: bool, space: Workspace) -> None:
        self._weight = f"{name}weight"
        self._bias = f"{name}bias" if "bias" in dict(layer.named_parameters()) else None
        self._name = name
        self._in, self.outputs = layer.in_features, layer.out_features
        self.numbers = self._in + self.outputs
        self._last = last
        self._space = space
        self._x: Tensor = torch.empty(0)

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs for ``x`` (a, w, in)."""
        self._x = x
        a, w, _ = x.shape
        weight = parameters[self._weight]
        if self._last:
            z, left, right, at = self._space.get(f"{self._name}z", a, self.outputs, w), weight, x.mT, 2
        else:
            z, left, right, at = self._space.get(f"{self._name}z", a, w, self.outputs), x, weight.mT, 1
        if self._bias is None:
            return torch.bmm(left, right, out=z)
        return torch.baddbmm(parameters[self._bias].unsqueeze(at), left, right, out=z)

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return the gradient of ``x``; before the weight's goes in, which may change the weight."""
        by_output = d if self._last else d.mT
        a, w, _ = self._x.shape
        dx = d
        if not first:
            dx = self._space.get(f"{self._name}dx", a, w, self._in)
            torch.bmm(by_output.mT, parameters[self._weight], out=dx)
        target.tensors[self._weight].baddbmm_(by_output, self._x, beta=target.keep, alpha=target.scale)
        if self._bias is not None:
            target.add(self._bias, d.sum(dim=2 if self._last else 1))
        return dx
