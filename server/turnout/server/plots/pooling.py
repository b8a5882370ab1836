"""Many values on few pixels: neighbours share a cell, so any number can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS: Final = 800


def block_size(count: int) -> int:
    """Return how many neighbours share a cell when there are ``count``: 1 while each has its own."""
    return max(1, -(-count // MOST_CELLS))


def pooled(values: Any) -> Any:
    """Return the means over neighbours along the first axis, at most `MOST_CELLS` of them."""
    values = np.asarray(values, float)
    block = block_size(len(values))
    if block == 1:
        return values
    starts = np.arange(0, len(values), block)
    sizes = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts, axis=0) / sizes.reshape(-1, *[1] * (values.ndim - 1))


def steps(panel: Axes, values: Any, **style: Any) -> None:
    """Draw one bar per value, on 0, 1, 2, ...; where there are too many, one per cell with the mean."""
    block, count = block_size(len(values)), len(values)
    edges = np.append(np.arange(0, count, block), count) - 0.5
    panel.stairs(pooled(values), edges, fill=True, **style)
