"""Parameters perturbed in place by a pair's noise, and put back by copying what was saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turnout.wire.perturbation import Draw, Factors, NoiseSource


class Perturbed:
    """The tensors that ``source`` perturbs, in its order; they are saved when this is made.

    Each member is written from the saved values, never from another member: adding a perturbation and taking
    it off again would leave rounding behind. Tensors must be float32 or float64.
    """

    def __init__(self, source: NoiseSource, tensors: Sequence[Tensor]) -> None:
        self._source = source
        self._tensors = [tensor.detach() for tensor in tensors]
        self._saved = [tensor.clone(memory_format=torch.contiguous_format) for tensor in self._tensors]

    def write(self, draws: Sequence[Draw], scale: float) -> None:
        """Set every tensor to its saved value plus ``scale`` times E."""
        factor = scale / math.sqrt(self._source.rank)
        with torch.no_grad():
            for spec, tensor, saved, draw in zip(
                self._source.tensors, self._tensors, self._saved, draws, strict=True
            ):
                if draw is None:
                    continue
                if isinstance(draw, Factors):
                    a, b = (torch.from_numpy(part).to(saved) for part in (draw.a, draw.b))
                    matrix = saved.view(spec.rows, spec.columns)
                    _fill(tensor, torch.addmm, matrix, a, b.T, alpha=factor)
                else:
                    noise = torch.from_numpy(draw).to(saved).view(saved.shape)
                    _fill(tensor, torch.add, saved, noise, alpha=scale)

    def restore(self) -> None:
        """Put the saved values back."""
        with torch.no_grad():
            for tensor, saved in zip(self._tensors, self._saved, strict=True):
                tensor.copy_(saved)


def _fill(
    tensor: Tensor, operation: Callable[..., Tensor], first: Tensor, *others: Tensor, alpha: float
) -> None:
    """Set ``tensor`` to ``operation(first, *others, alpha=alpha)``, in place where its memory allows it."""
    if tensor.is_contiguous():
        operation(first, *others, alpha=alpha, out=tensor.view(first.shape))
    else:
        tensor.copy_(operation(first, *others, alpha=alpha).view(tensor.shape))
