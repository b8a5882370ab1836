"""The least-squares way back from a direction of dense updates to a gradient of their factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from turnout.strategies.dense_updates import Factors
from turnout.wire import NDArray

# Conjugate directions are as many as the map has singular values.
_ITERATIONS: Final = 200
_RESIDUAL: Final = 1e-6


def least_gradient(
    factors: Factors,
    dense: NDArray,
    motion: Callable[[Factors], NDArray],
    adjoint: Callable[[NDArray], Factors],
) -> Factors:
    """Return the least gradient, in the shapes of ``factors``, whose ``motion`` is nearest to ``dense``.

    By conjugate gradients on the normal equations, from zero. ``motion`` is linear, ``adjoint`` its adjoint.
    """
    solution: Factors = tuple(np.zeros_like(factor) for factor in factors)
    residual = np.array(dense)
    slope = direction = adjoint(residual)
    size = first = _square(slope)
    for _ in range(_ITERATIONS):
        if size <= _RESIDUAL**2 * first:
            break
        moved = motion(direction)
        step = size / float(np.square(moved).sum())
        solution = _sum(solution, direction, step)
        residual -= step * moved
        slope = adjoint(residual)
        before, size = size, _square(slope)
        direction = _sum(slope, direction, size / before)
    return solution


def _sum(one: Factors, other: Factors, weight: float) -> Factors:
    return tuple(x + weight * y for x, y in zip(one, other, strict=True))


def _square(factors: Factors) -> float:
    return sum(float(np.square(factor).sum()) for factor in factors)
