"""LoRA's factors averaged as dense updates ``s B A``, and factorised again by SVD.

Factors are only unique up to ``(B M, M^-1 A)``, while clients' optimizers, gradients and local models live in
their coordinates. So A stays as near as it can to the previous one, and B follows.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from turnout.strategies.dense_updates import RANK, Factors
from turnout.strategies.low_rank_updates import LowRankUpdates
from turnout.wire import NDArray

# The smallest singular value of a new A, as a share of the previous A's mean one: keeps B bounded.
_FLOOR: Final = 0.1


class SvdFactors(LowRankUpdates):
    """Dense updates ``scale B A`` inside, the factors A and B outside."""

    def product(self, factors: Factors, path: str) -> NDArray:
        """Return ``B A``."""
        a, b = factors
        dense: NDArray = b @ a
        return dense

    def factorised(self, dense: NDArray, before: Factors, path: str) -> Factors:
        """Return A, near that of ``before``, and B: B A is the best approximation of ``dense``."""
        a = before[0]
        rank = a.shape[0]
        u, s, vh = np.linalg.svd(dense, full_matrices=False)
        kept = int((s[:rank] > RANK * max(float(s[0]), 1e-30)).sum())
        rows = vh[:kept]
        if kept < rank:  # Room is left: for what the previous A has beyond.
            rest = a - a @ rows.T @ rows
            rows = np.concatenate([rows, np.linalg.svd(rest, full_matrices=False)[2][: rank - kept]])
        # The nearest A with these rows' span is the projection; its small singular values are lifted.
        left, sizes, right = np.linalg.svd(a @ rows.T, full_matrices=False)
        floor = _FLOOR * float(np.sqrt(np.square(a).sum() / rank))
        lifted = np.maximum(sizes, floor)
        inverse = rows.T @ right.T / lifted @ left.T  # The new A's pseudo-inverse, (d_in, r).
        return (left * lifted) @ right @ rows, (u[:, :kept] * s[:kept]) @ (vh[:kept] @ inverse)

    def motion(self, factors: Factors, gradient: Factors, path: str) -> NDArray:
        """Return ``G_B A + B G_A``."""
        (a, b), (ga, gb) = factors, gradient
        dense: NDArray = gb @ a + b @ ga
        return dense

    def gradient(self, factors: Factors, dense: NDArray, path: str) -> Factors:
        """Return the least (G_A, G_B) that minimise ``||G_B A + B G_A - dense||``."""
        a, b = factors
        ua, sa, va = np.linalg.svd(a, full_matrices=False)  # (r, r), (r,), (r, d_in)
        ub, sb, vb = np.linalg.svd(b, full_matrices=False)  # (d_out, r), (r,), (r, r)
        inverse_a, inverse_b = _inverse(sa), _inverse(sb)
        ub, va = ub * (sb > 0), va * (sa > 0)[:, None]
        right, left = dense @ va.T, ub.T @ dense  # (d_out, r), (r, d_in)
        core = ub.T @ right
        weights = np.square(sa)[None, :] + np.square(sb)[:, None]
        share = np.divide(core, weights, out=np.zeros_like(core), where=weights > 0)
        gb = ((right - ub @ core) * inverse_a + ub @ (share * sa[None, :])) @ ua.T
        ga = vb.T @ (inverse_b[:, None] * (left - core @ va) + (share * sb[:, None]) @ va)
        return ga, gb


def _inverse(s: NDArray) -> NDArray:
    """Return the pseudo-inverse of singular values; those of rounding's size become 0, in place."""
    s[s <= RANK * max(float(s.max(initial=0.0)), 1e-30)] = 0.0
    return np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)
