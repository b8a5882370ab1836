"""Columns: one number per row in an array that grows by doubling, and their short form in a checkpoint.

A federation registers far more clients than take part in a round. What is kept about each is therefore a few
columns rather than an object per client, and a checkpoint stores of a column what it must: nothing but the
first value for one that counts or stands still, the other rows only where most are the same, else its numbers
in the smallest type that holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.errors import CheckpointError

_MOST_ROWS: Final = 2**31
_SMALLEST: Final = 16
# A row that is stored on its own takes its number and its index.
_SPARSE_BELOW: Final = 0.25


class Column:
    """A growing column of ``dtype``; rows that were not set hold ``fill``."""

    def __init__(self, dtype: Any, fill: float = 0) -> None:
        self._fill = fill
        self._array = np.empty(0, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> Any:
        """Return the value of ``row`` as a plain number; `IndexError` beyond the end or below 0."""
        if not 0 <= row < self._size:
            raise IndexError(f"row {row} of {self._size}")
        return self._array.item(row)

    def __setitem__(self, row: int | slice, value: Any) -> None:
        self.values[row] = value

    @property
    def values(self) -> NDArray:
        """The column as an array that shares its memory, valid until the column grows."""
        return self._array[: self._size]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return int(self.values.nbytes)

    def reach(self, size: int) -> None:
        """Grow to at least ``size`` rows."""
        if size > len(self._array):
            grown = np.full(max(size, 2 * len(self._array), _SMALLEST), self._fill, self._array.dtype)
            grown[: self._size] = self.values
            self._array = grown
        self._size = max(self._size, size)

    def append(self, value: Any) -> int:
        """Add one row and return its number."""
        row = self._size
        self.reach(row + 1)
        self._array[row] = value
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the column in its short form."""
        return pack(self.values)

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the column with that of `state_dict`. Raises `CheckpointError` for anything else."""
        self._array = unpack(tree, self._array.dtype)
        self._size = len(self._array)


def pack(values: NDArray) -> dict[str, Any]:
    """Return the short form of ``values``, shape (rows,), which `unpack` turns back bit for bit."""
    count = len(values)
    if not count:
        return {"count": 0}
    # Compared as bits: -0.0 and NaN are what they are.
    bits = values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values
    other = np.flatnonzero(bits != bits[0])
    if len(other) < _SPARSE_BELOW * count:
        rows = {"rows": narrowed(other), "values": narrowed(values[other])} if len(other) else {}
        return {"count": count, "first": values[:1].copy(), **rows}
    step = values.item(1) - values.item(0) if values.dtype.kind in "iu" else 0
    if step == 1 and values[0] < values[-1] and bool((values[1:] - values[:-1] == 1).all()):
        return {"count": count, "from": values.item(0)}
    return {"count": count, "values": narrowed(values)}


def unpack(tree: Mapping[str, Any], dtype: Any) -> NDArray:
    """Return a new array of ``dtype`` from what `pack` returned; raises `CheckpointError` for others."""
    try:
        count = int(tree["count"])
        if not 0 <= count <= _MOST_ROWS:
            raise ValueError(f"{count} rows")
        if not count:
            whole = np.empty(0, dtype)
        elif "from" in tree:
            # Counted in whole numbers that wrap around, so that the largest 64-bit ids are no exception.
            steps = np.arange(count, dtype=np.uint64) + np.uint64(int(tree["from"]) % 2**64)
            whole = steps.view(np.int64).astype(dtype)
        elif "first" in tree:
            whole = np.repeat(np.asarray(tree["first"]).astype(dtype), count)
            if "rows" in tree:
                whole[tree["rows"]] = tree["values"]
        else:
            whole = np.array(tree["values"], dtype)
        if whole.shape != (count,):
            raise ValueError(f"{whole.shape} for {count} rows")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"a column in the checkpoint is not readable ({error!r}).") from error
    return whole


def narrowed(values: NDArray) -> NDArray:
    """Return numbers in the smallest type that holds them all without loss."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            short = values.astype(np.float32)
        return short if short.astype(values.dtype).tobytes() == values.tobytes() else values
    if not len(values):
        return values.astype(np.int8)
    low, high = int(values.min()), int(values.max())
    kinds = ("u1", "u2", "u4", "u8") if low >= 0 else ("i1", "i2", "i4", "i8")
    return values.astype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max))
