"""Two ways to hand out a budget by score: to the best, or in proportion."""

from __future__ import annotations

import numpy as np

from turnout.wire.arrays import NDArray


def keep_top(scores: NDArray, budget: int) -> NDArray:
    """Return a boolean mask of the ``budget`` largest of ``scores``, shape (n,).

    Exactly so many are kept: of equal scores, those that come first.
    """
    mask = np.zeros(scores.shape, bool)
    mask[np.argsort(-scores, kind="stable")[: max(budget, 0)]] = True
    return mask


def share_out(budget: int, scores: NDArray, caps: NDArray) -> NDArray:
    """Return whole units per layer, in proportion to ``scores`` but at most ``caps``; both have shape (L,).

    They sum to ``min(budget, caps.sum())``. What a full layer cannot take goes to the others in proportion
    again; the rest of rounding goes to the largest remainders. Scores that are all zero count as equal.
    """
    caps = caps.astype(np.int64)
    weights = np.maximum(np.nan_to_num(scores.astype(np.float64)), 0.0)
    if not weights.any():
        weights = np.ones_like(weights)
    shares = np.zeros(len(caps), np.int64)
    left = min(int(budget), int(caps.sum()))
    while left > 0:
        is_open = shares < caps
        part = np.where(is_open, weights, 0.0)
        if not part.any():  # Only layers without a score have room.
            part = is_open.astype(np.float64)
        part /= part.max()  # First, or the smallest numbers have no reciprocal.
        wanted = part * (left / part.sum())
        given = np.minimum(np.floor(wanted).astype(np.int64), caps - shares)
        if not given.any():
            order = np.argsort(np.where(is_open, -wanted, np.inf), kind="stable")
            given[order[: min(left, int(is_open.sum()))]] = 1
        shares += given
        left -= int(given.sum())
    return shares
