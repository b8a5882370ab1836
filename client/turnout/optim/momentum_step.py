"""A step along a momentum, and how an error of the weights is put into it for the next steps to repay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MomentumStep:
    """A step along the momentum: of ``size``, over a denominator for each coordinate if there is one."""

    size: float
    denominator: Tensor | None = None

    def taken(self, W: Tensor, M: Tensor) -> Tensor:
        """Return the weights after the step, unrounded."""
        if self.denominator is None:
            return W.add(M, alpha=-self.size)
        return W.addcdiv(M, self.denominator, value=-self.size)

    def repay(self, M: Tensor, error: Tensor, coefficient: float) -> None:
        """Put a rounding error into the momentum, for the next steps to repay."""
        if self.denominator is None:
            M.add_(error, alpha=coefficient / self.size)
        else:
            M.addcmul_(error, self.denominator, value=coefficient / self.size)
