"""Fewer points of a series, such that its line looks the same."""

from __future__ import annotations

import numpy as np

from turnout.dashboard.queries.series import Points
from turnout.wire import NDArray


def downsampled(series: Points, most: int) -> Points:
    """Return at most ``most`` points: of each bucket of neighbours the smallest and the largest value.

    The first and the last point stay, and so do the extremes of the whole. A bucket without any number keeps
    its first point, so that a gap stays a gap. A series that fits comes back whole.
    """
    count = len(series.rounds)
    if count <= most:
        return series
    kept = _kept(series.values, most)
    return Points(series.rounds[kept], series.values[kept])


def _kept(values: NDArray, most: int) -> NDArray:
    count = len(values)
    inner = max((most - 2) // 2, 1)
    edges = np.linspace(1, count - 1, inner + 1).astype(np.int64)
    starts, stops = edges[:-1], edges[1:]
    # One row per bucket, padded with NaN.
    width = int((stops - starts).max())
    places = starts[:, None] + np.arange(width)[None, :]
    block = np.where(places < stops[:, None], values[np.minimum(places, count - 1)], np.nan)
    known = ~np.isnan(block)
    low = np.where(known, block, np.inf).argmin(axis=1)
    high = np.where(known, block, -np.inf).argmax(axis=1)
    filled = starts < stops
    kept = np.concatenate(([0], (starts + low)[filled], (starts + high)[filled], [count - 1]))
    return np.unique(kept)
