"""AdaLoRA's triplets averaged as dense updates ``s B diag(E) A``, and taken apart again by SVD.

The server's decomposition makes the columns of B and the rows of A orthonormal, which is what the method's
penalty asks of clients (arXiv 2303.10512, eq. 4), and leaves the best approximation at any rank.
"""

from __future__ import annotations

import numpy as np

from turnout.strategies.dense_updates import RANK, Factors
from turnout.strategies.least_gradient import least_gradient
from turnout.strategies.low_rank_updates import LowRankUpdates
from turnout.wire import NDArray


class SvdTriplets(LowRankUpdates):
    """Dense updates ``scale B (E * A)`` inside; A (r, d_in), B (d_out, r) and E (r, 1) outside.

    A triplet of the decomposition takes the place, and the signs, of the previous one that it resembles most.
    """

    def product(self, factors: Factors, path: str) -> NDArray:
        """Return ``B (E * A)``."""
        a, b, e = factors
        dense: NDArray = b @ (e * a)
        return dense

    def factorised(self, dense: NDArray, before: Factors, path: str) -> Factors:
        """Return the largest r singular triplets of ``dense``; where it has fewer, E is 0.

        The rows and columns there are the previous ones, made orthonormal to the others, so that clients can
        bring them to life.
        """
        a, b = (np.array(part) for part in before[:2])
        e = np.zeros_like(before[2])
        rank = len(a)
        u, s, vh = np.linalg.svd(dense, full_matrices=False)
        kept = int((s[:rank] > RANK * max(float(s[0]), 1e-30)).sum())
        taken = np.zeros(rank, bool)
        for place, k in _matched(a @ vh[:kept].T, b.T @ u[:, :kept]):
            row, column = _sign(a[place] @ vh[k]), _sign(b[:, place] @ u[:, k])
            a[place], b[:, place], e[place] = row * vh[k], column * u[:, k], row * column * s[k]
            taken[place] = True
        _complete(a, taken)
        _complete(b.T, taken)
        return a, b, e

    def motion(self, factors: Factors, gradient: Factors, path: str) -> NDArray:
        """Return ``G_B (E A) + (B E) G_A + B (G_E A)``."""
        (a, b, e), (ga, gb, ge) = factors, gradient
        dense: NDArray = gb @ (e * a) + (b * e.T) @ ga + b @ (ge * a)
        return dense

    def gradient(self, factors: Factors, dense: NDArray, path: str) -> Factors:
        """Return the least gradient that minimises the distance of its `motion` from ``dense``."""
        return least_gradient(
            factors,
            dense,
            lambda direction: self.motion(factors, direction, path),
            lambda residual: _adjoint(factors, residual),
        )


def _matched(rows: NDArray, columns: NDArray) -> list[tuple[int, int]]:
    """Return (place, triplet) for every triplet, the most alike first.

    ``rows`` and ``columns`` (r, n) are inner products of the previous vectors with the new ones.
    """
    alike = np.abs(rows * columns)
    pairs: list[tuple[int, int]] = []
    for _ in range(rows.shape[1]):
        place, k = np.unravel_index(int(alike.argmax()), alike.shape)
        pairs.append((int(place), int(k)))
        alike[place, :] = alike[:, k] = -1.0
    return pairs


def _complete(rows: NDArray, taken: NDArray) -> None:
    """Make the ``rows`` that are not ``taken`` orthonormal to all others, in place, if there is room."""
    basis = list(rows[taken])
    for place in np.flatnonzero(~taken):
        row = rows[place] / max(float(np.linalg.norm(rows[place])), 1e-30)
        rest = row
        for _ in range(2):  # Once is not enough in floating point.
            rest = rest - sum((other @ rest) * other for other in basis)
        length = float(np.linalg.norm(rest))
        rows[place] = rest / length if length > RANK else row
        if length > RANK:
            basis.append(rows[place].copy())


def _sign(number: float) -> float:
    return -1.0 if number < 0 else 1.0


def _adjoint(factors: Factors, dense: NDArray) -> Factors:
    a, b, e = factors
    across = b.T @ dense
    return e * across, dense @ (e * a).T, (across * a).sum(axis=1, keepdims=True)
