"""Which modules have layers written by hand, and how they are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from torch import nn

from turnout.client.batched.layers.activation import ACTIVATIONS, Activation
from turnout.client.batched.layers.flatten import Flatten
from turnout.client.batched.layers.layer import Layer
from turnout.client.batched.layers.linear import Linear
from turnout.client.batched.workspace import Workspace

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def sequence_of(module: nn.Module, x_shape: Sequence[int], space: Workspace) -> list[Layer] | None:
    """Return layers that compute what ``module`` does on inputs of shape (n, *x_shape), or None.

    Only exact classes count: a subclass may compute something else, and so may a hook.
    """
    named = list(module.named_children()) if type(module) is nn.Sequential else [("", module)]
    if not named or any(getattr(m, hooks) for m in module.modules() for hooks in _HOOKS):
        return None
    if not all(p.requires_grad for p in module.parameters()):
        return None
    layers: list[Layer] = []
    shape, owned = tuple(x_shape), False
    for i, (name, child) in enumerate(named):
        kind, settings = type(child), vars(child)
        if kind is nn.Flatten and (settings["start_dim"], settings["end_dim"]) == (1, -1):
            layers.append(Flatten())
            shape = (math.prod(shape),)
        elif isinstance(child, nn.Linear) and kind is nn.Linear and shape == (child.in_features,):
            last = i == len(named) - 1
            layers.append(Linear(f"{name}." if name else "", child, last=last, space=space))
            shape, owned = (child.out_features,), True
        elif kind in ACTIVATIONS and owned:
            layers.append(Activation(kind))
            owned = False
        else:
            return None
    return layers if type(named[-1][1]) is nn.Linear else None
