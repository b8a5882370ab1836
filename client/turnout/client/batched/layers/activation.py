"""Activations, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from turnout.client.batched.layers.layer import Layer, Target

_aten: Final = torch.ops.aten


def _relu_backward(d: Tensor, y: Tensor) -> Tensor:
    result: Tensor = _aten.threshold_backward.grad_input(d, y, 0, grad_input=d)
    return result


def _tanh_backward(d: Tensor, y: Tensor) -> Tensor:
    result: Tensor = _aten.tanh_backward.grad_input(d, y, grad_input=d)
    return result


def _sigmoid_backward(d: Tensor, y: Tensor) -> Tensor:
    result: Tensor = _aten.sigmoid_backward.grad_input(d, y, grad_input=d)
    return result


# By class: the function in place, and the gradient in place, given that of the output and the output.
ACTIVATIONS: Final[
    dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]]
] = {
    nn.ReLU: (torch.relu_, _relu_backward),
    nn.Tanh: (torch.tanh_, _tanh_backward),
    nn.Sigmoid: (torch.sigmoid_, _sigmoid_backward),
}


class Activation(Layer):
    """An activation whose gradient follows from its output. Its input is overwritten."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self._function, self._gradient = ACTIVATIONS[kind]
        self._y: Tensor = torch.empty(0)

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the activated ``x``, which is changed."""
        self._y = self._function(x)
        return self._y

    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Return the gradient of the input in ``d``."""
        return self._gradient(d, self._y)
