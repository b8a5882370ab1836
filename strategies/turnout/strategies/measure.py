"""One pass over a client's vector: what it differs by from the one sent, its size, and whether it is sane."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from turnout.strategies.blockwise import BLOCK, blockwise
from turnout.wire.arrays import NDArray
from turnout.wire.errors import ReplyRejected

# A block's sum of squares of such values still is a finite float32, and no honest model comes near.
_LARGEST: Final = 1e16


def measured(vector: NDArray, minus: NDArray | None, out: NDArray, name: str) -> tuple[float, float]:
    """Put ``vector - minus`` (None: the vector itself) into ``out``, all of shape (P,).

    Returns its largest absolute value and its Euclidean norm. Raises `ReplyRejected` that names the record
    ``name`` when a value is not finite or absurdly large.
    """

    def piece(begin: int, end: int) -> list[tuple[float, float, float]]:
        figures = []
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            block = out[start:stop]
            if minus is None:
                block[...] = vector[start:stop]
            else:
                with np.errstate(invalid="ignore", over="ignore"):  # Inf - Inf: refused just below.
                    np.subtract(vector[start:stop], minus[start:stop], out=block)
            high, low = extremes(block)
            check_range(name, high, low)
            figures.append((high, low, float(np.dot(block, block))))
        return figures

    figures = blockwise(vector.size, piece)
    largest = max((max(high, -low) for high, low, _ in figures), default=0.0)
    return largest, math.sqrt(math.fsum(squares for _, _, squares in figures))


def measured_rows(
    rows: NDArray, minus: NDArray | None, name: str
) -> tuple[NDArray, NDArray, dict[int, ReplyRejected]]:
    """Do the same for vectors that are the ``rows`` of a matrix (k, P), in place.

    Returns their peaks and norms, shape (k,) each, and why rows are refused, by index.
    """
    count, width = rows.shape
    peaks, norms = np.empty(count), np.empty(count)
    refused: dict[int, ReplyRejected] = {}
    step = max(1, BLOCK // max(1, width))
    for start in range(0, count, step):
        piece = slice(start, start + step)
        block = rows[piece]
        with np.errstate(invalid="ignore", over="ignore"):
            if minus is not None:
                np.subtract(block, minus, out=block)
            high, low = block.max(axis=1), block.min(axis=1)
            norms[piece] = np.sqrt(np.vecdot(block, block))
        peaks[piece] = np.maximum(high, -low)
        for index in np.flatnonzero(~((high < _LARGEST) & (low > -_LARGEST))).tolist():
            try:
                check_range(name, float(high[index]), float(low[index]))
            except ReplyRejected as error:
                refused[start + index] = error
    return peaks, norms, refused


def extremes(block: NDArray) -> tuple[float, float]:
    """Return the largest and the smallest value (0 for none)."""
    return (float(block.max()), float(block.min())) if block.size else (0.0, 0.0)


def check_range(name: str, high: float, low: float) -> None:
    """Raise `ReplyRejected` unless values from ``low`` to ``high`` are finite and not absurd."""
    if not (high < _LARGEST and low > -_LARGEST):  # False for NaN too.
        if math.isfinite(high) and math.isfinite(low):
            raise ReplyRejected("too-large", f"{name!r} holds values beyond {_LARGEST:g}.")
        raise ReplyRejected("non-finite", f"{name!r} holds NaN or infinity.")
