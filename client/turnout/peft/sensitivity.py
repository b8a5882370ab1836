"""Smoothed sensitivity of weights, AdaLoRA's importance (arXiv 2303.10512, eqs. 8-11); SNELLA has it too."""

from __future__ import annotations

import torch
from torch import Tensor


class Sensitivity:
    """``Ibar * Ubar`` of one tensor: how much the loss depends on each entry, and how uncertain that is.

    With ``I = |w * gradient|``: ``Ibar = b1 Ibar + (1 - b1) I``, ``Ubar = b2 Ubar + (1 - b2) |I - Ibar|``,
    the second with the new Ibar.
    """

    def __init__(self, tensor: Tensor, beta1: float, beta2: float) -> None:
        self._betas = beta1, beta2
        self.mean = torch.zeros_like(tensor, requires_grad=False)
        self.uncertainty = torch.zeros_like(self.mean)

    def update(self, weight: Tensor, gradient: Tensor | None) -> None:
        """Take in the gradient of a step; one that is not a number counts as 0."""
        if gradient is None:
            return
        beta1, beta2 = self._betas
        with torch.no_grad():
            now = torch.nan_to_num(weight * gradient).abs_()
            self.mean.lerp_(now, 1 - beta1)
            self.uncertainty.lerp_(now.sub_(self.mean).abs_(), 1 - beta2)

    def score(self) -> Tensor:
        """Return the score of every entry, in the tensor's shape."""
        return self.mean * self.uncertainty
