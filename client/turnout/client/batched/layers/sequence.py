"""Which modules have layers written by hand, and how they are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from torch import nn

from turnout.client.batched.layers.activation import ACTIVATIONS, Activation
from turnout.client.batched.layers.convolution import Convolution, padding_of
from turnout.client.batched.layers.flatten import Flatten
from turnout.client.batched.layers.images import ChannelsLast, FlattenImages, MaxPool
from turnout.client.batched.layers.layer import Layer
from turnout.client.batched.layers.linear import Linear
from turnout.client.batched.workspace import Workspace

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IMAGE: Final = 3


def sequence_of(module: nn.Module, x_shape: Sequence[int], space: Workspace) -> list[Layer] | None:
    """Return layers that compute what ``module`` does on inputs of shape (n, *x_shape), or None.

    Only exact classes count: a subclass may compute something else, and so may a hook or a replaced
    ``forward``.
    """
    # Not `named_children`, which lists a layer that is used twice only once.
    named = list(module._modules.items()) if type(module) is nn.Sequential else [("", module)]
    if not named or type(named[-1][1]) is not nn.Linear:
        return None
    if any(getattr(m, hooks) for m in module.modules() for hooks in _HOOKS):
        return None
    if any("forward" in vars(m) for m in module.modules()):
        return None
    if not all(p.requires_grad for p in module.parameters()):
        return None
    built = _Sequence(tuple(x_shape), space)
    ordered = _pool_before_relu([(f"{name}." if name else "", child) for name, child in named])
    fits = all(built.add(name, child, last=i == len(named) - 1) for i, (name, child) in enumerate(ordered))
    return built.layers if fits else None


def _pool_before_relu(named: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Swap each ReLU with a max pool behind it: the same function and gradients, on fewer numbers."""
    ordered = list(named)
    for i in range(1, len(ordered)):
        if type(ordered[i][1]) is nn.MaxPool2d and type(ordered[i - 1][1]) is nn.ReLU:
            ordered[i - 1], ordered[i] = ordered[i], ordered[i - 1]
    return ordered


class _Sequence:
    """Layers so far, and the ``shape`` of one example behind them (images: channels, height, width)."""

    def __init__(self, shape: tuple[int, ...], space: Workspace) -> None:
        self.layers: list[Layer] = []
        self._shape = shape
        self._space = space
        self._channels_last = False
        # Whether the last output may be overwritten: the data may not, nor what an activation needs again.
        self._owned = False

    def add(self, name: str, child: nn.Module, *, last: bool) -> bool:
        """Add what computes ``child``; return False when there is no such layer."""
        kind = type(child)
        if kind in ACTIVATIONS and self._owned:
            self.layers.append(Activation(kind))
            self._owned = False
            return True
        settings: dict[str, Any] = vars(child)
        if kind is nn.Flatten and settings["start_dim"] == 1 and settings["end_dim"] == -1:
            return self._flatten(name)
        if isinstance(child, nn.Linear) and kind is nn.Linear and self._shape == (child.in_features,):
            self.layers.append(Linear(name, child, last=last, space=self._space))
            self._shape, self._owned = (child.out_features,), True
            return True
        if isinstance(child, nn.Conv2d) and kind is nn.Conv2d:
            return self._convolution(name, child)
        return kind is nn.MaxPool2d and self._pool(settings)

    def _flatten(self, name: str) -> bool:
        self.layers.append(FlattenImages(name, self._space) if self._channels_last else Flatten())
        self._shape, self._channels_last = (math.prod(self._shape),), False
        return True

    def _images(self) -> bool:
        """Go over to channels last."""
        if len(self._shape) != _IMAGE:
            return False
        if not self._channels_last:
            self.layers.append(ChannelsLast(self._space))
            self._channels_last = True
        return True

    def _convolution(self, name: str, child: nn.Conv2d) -> bool:
        plain = child.stride == (1, 1) and child.dilation == (1, 1) and child.groups == 1
        if not plain or child.padding_mode != "zeros" or not self._images():
            return False
        try:
            padding = padding_of(child)
        except ValueError:
            return False
        if self._shape[0] != child.in_channels:
            return False
        height, width = (self._shape[1 + i] + 2 * padding[i] - child.kernel_size[i] + 1 for i in (0, 1))
        self.layers.append(Convolution(name, child, pixels=height * width, space=self._space))
        self._shape, self._owned = (child.out_channels, height, width), True
        return height > 0 and width > 0

    def _pool(self, settings: dict[str, Any]) -> bool:
        kernel, stride, padding = (_pair(settings[key]) for key in ("kernel_size", "stride", "padding"))
        plain = _pair(settings["dilation"]) == [1, 1] and not settings["ceil_mode"]
        if not plain or settings["return_indices"] or not self._images():
            return False
        height, width = ((self._shape[1 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
        self.layers.append(MaxPool(kernel, stride, padding))
        self._shape, self._owned = (self._shape[0], height, width), True
        return height > 0 and width > 0


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
