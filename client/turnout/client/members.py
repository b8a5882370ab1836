"""Many perturbed members of one model in one tensor program (EGGROLL, arXiv 2511.16652).

A member's matrix is ``W + s sigma A B^T / sqrt(r)``, which is never formed:
``x W^T + s (sigma / sqrt(r)) (x B) A^T`` takes one product with W for all members, and thin ones for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from turnout.wire.arrays import NDArray
from turnout.wire.perturbation import Draw, NoiseSource

# They treat every number alike, so may be given any leading dimensions. Dropout does nothing in evaluation.
_ELEMENTWISE: Final = frozenset(
    {
        nn.Dropout,
        nn.ELU,
        nn.GELU,
        nn.Identity,
        nn.LeakyReLU,
        nn.ReLU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
    }
)
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
# Numbers that the widest layer puts out at a time: a few MB, and enough rows for a fast product.
_CHUNK_NUMBERS: Final = 1 << 20

PairDraw = Sequence[Draw]
"""The noise of one pair, per tensor of its `NoiseSource`."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One module; for a linear layer, where its weight and bias are among the perturbed tensors."""

    module: nn.Module
    weight: int | None = None
    bias: int | None = None

    @property
    def linear(self) -> bool:
        """Whether it has a weight, perturbed or not."""
        return isinstance(self.module, nn.Linear)


class Members:
    """Outputs of a model's members on a minibatch. The module must be in evaluation mode.

    ``steps`` are linear layers, activations between them, and a flattening before them.
    """

    def __init__(self, steps: Sequence[_Step], source: NoiseSource) -> None:
        self._steps = steps
        self._root = math.sqrt(source.rank)
        layers = [step.module for step in steps if isinstance(step.module, nn.Linear)]
        self._width = max(max(layer.in_features, layer.out_features) for layer in layers)

    @classmethod
    def of(cls, module: nn.Module, source: NoiseSource, x: Tensor) -> Members | None:
        """Return the members of ``module`` under ``source`` for inputs like ``x``; None for unknown layers.

        Only exact classes count: a subclass may compute something else, and so may a hook or a replaced
        ``forward``. Matrices under full-rank noise are not known: there is no cheaper way than to form them.
        """
        modules = list(module.modules())
        if any("forward" in vars(m) or any(getattr(m, hooks) for hooks in _HOOKS) for m in modules):
            return None
        # Not `named_children`, which lists a layer that is used twice only once.
        named = list(module._modules.items()) if type(module) is nn.Sequential else [("", module)]
        places = {tensor.name: i for i, tensor in enumerate(source.tensors)}
        steps: list[_Step] = []
        flat = x.dim() == 2
        for name, child in named:
            flat = flat or _flattens(child)
            prefix = f"{name}." if name else ""
            if type(child) is nn.Linear and flat:
                steps.append(_Step(child, places.get(f"{prefix}weight"), places.get(f"{prefix}bias")))
            elif type(child) in _ELEMENTWISE or (_flattens(child) and not any(s.linear for s in steps)):
                steps.append(_Step(child))
            else:
                return None
        kinds = {source.tensors[i].kind for step in steps if (i := step.weight) is not None}
        covered = sum((step.weight is not None) + (step.bias is not None) for step in steps)
        moved = any(tensor.kind != "frozen" for tensor in source.tensors)
        return cls(steps, source) if moved and "full" not in kinds and covered == len(places) else None

    @torch.no_grad()
    def outputs(self, x: Tensor, draws: Sequence[PairDraw], sigma: float) -> Iterator[Tensor]:
        """Yield the outputs for ``x`` (b, ...) of the pairs ``draws`` in order, some pairs at a time.

        Each is (pairs, 2, b, out), the plus members first. How many pairs go together follows from the sizes
        alone, so that every machine adds up the same numbers in the same order.
        """
        together = max(1, _CHUNK_NUMBERS // (2 * len(x) * self._width))
        for start in range(0, len(draws), together):
            some, y = draws[start : start + together], x
            for step in self._steps:
                y = self._linear(y, step, some, sigma) if step.linear else step.module(y)
            yield y

    def _linear(self, x: Tensor, step: _Step, draws: Sequence[PairDraw], sigma: float) -> Tensor:
        """Return (pairs, 2, b, out) for ``x`` (pairs, 2, b, in), or (b, in) while all members share it."""
        base: Tensor = step.module(x)
        pairs, examples, shared = len(draws), x.shape[-2], x.dim() == 2
        signs = torch.tensor([sigma, -sigma], dtype=x.dtype, device=x.device).view(2, 1, 1)
        # All terms of a member as one product: (x B, 1) times (A, e)^T.
        left, right = list[Tensor](), list[Tensor]()
        factors = _drawn(draws, step.weight)
        if factors:
            a, b = (_stacked([getattr(one, part) for one in factors], x) for part in ("a", "b"))
            thin = torch.matmul(x if shared else x.view(pairs, 2 * examples, -1), b) / self._root
            left.append((thin.unsqueeze(1) if shared else thin.view(pairs, 2, examples, -1)) * signs)
            right.append(a.mT)
        vectors = _drawn(draws, step.bias)
        if vectors:
            left.append(signs.expand(pairs, 2, examples, 1))
            right.append(_stacked(vectors, x).unsqueeze(1))
        if not right:
            return base
        start = base.repeat(2, 1) if shared else base.view(pairs, 2 * examples, -1)
        thin = torch.cat(left, dim=3).view(pairs, 2 * examples, -1)
        return torch.baddbmm(start, thin, torch.cat(right, dim=1)).view(pairs, 2, examples, -1)


def _flattens(module: nn.Module) -> bool:
    """Whether it leaves one dimension for each example."""
    return type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1


def _drawn(draws: Sequence[PairDraw], place: int | None) -> list[Any]:
    """Return the pairs' noise of one tensor; empty for one that is not perturbed."""
    return [] if place is None or draws[0][place] is None else [draw[place] for draw in draws]


def _stacked(parts: Sequence[NDArray], like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(parts)).to(like)
