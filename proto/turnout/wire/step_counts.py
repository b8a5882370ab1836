"""A tensor that moved by whole multiples of a step, as how many steps each number moved.

FRUGAL (arXiv 2411.07837) moves most weights by signs: after E steps of size a, from ``old`` to ``old - a z``
with a whole z in [-E, E], log2(2 E + 1) bits instead of 32. Numbers that moved otherwise travel as they are.
The bytes: the step (8), E (4), which numbers are whole (1) and three zeros; a bit for each row, column or
entry that is; the whole numbers; the counts plus E, see `turnout.wire.digits`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from flwr.app import Array

from turnout.wire.arrays import NDArray
from turnout.wire.declared import FLOATS
from turnout.wire.digits import MOST_BASE, pack_digits, packed_size, unpack_digits
from turnout.wire.errors import LayoutError
from turnout.wire.flower import dtype_name

STEP_COUNTS_STYPE: Final = "turnout.step-counts"
_HEAD: Final = struct.Struct("<dIB3x")
_MOST_STEPS: Final = (MOST_BASE - 1) // 2


@dataclass(frozen=True, slots=True, eq=False)
class StepCounts:
    """How a tensor moved, seen as a matrix (m, n) of its first dimension by the rest.

    ``most`` is E, the number of steps of size ``step``. ``whole`` marks numbers that moved otherwise: bool of
    shape (m, 1) for rows, (1, n) for columns, (m, n) for entries; None when there are none.
    """

    step: float
    most: int
    whole: NDArray | None = None


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a tensor's shape as a matrix: its first dimension by the rest."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def as_step_counts(new: NDArray, old: NDArray, how: StepCounts) -> Array:
    """Encode ``new``, float32 or float64, for a receiver who has ``old``; see `step_counts_view`.

    Raises `LayoutError` when a number did not move by steps: more than their roundings away from a multiple.
    """
    m, n = matrix_shape(new.shape)
    kind, mask = 0, np.zeros((m, n), bool)
    if how.whole is not None:
        kind = _kind(how.whole.shape, m, n)
        mask |= how.whole
    counted = ~mask.reshape(-1)
    counts = _counts(new.reshape(-1)[counted], old.reshape(-1)[counted], how)
    pieces = [
        _HEAD.pack(how.step, how.most, kind),
        b"" if how.whole is None else np.packbits(how.whole).tobytes(),
        np.asarray(new.reshape(-1)[~counted], new.dtype.newbyteorder("<")).tobytes(),
        pack_digits(counts + how.most, 2 * how.most + 1),
    ]
    return Array(dtype_name(new.dtype), tuple(new.shape), STEP_COUNTS_STYPE, b"".join(pieces))


def step_counts_view(array: Array, old: NDArray) -> NDArray:
    """Return the content of an array of `as_step_counts`, read-only: ``old - step * z``, rounded once.

    Raises `LayoutError` when the array is not one for ``old``, whose shape and dtype it must have, or the
    bytes do not hold what they declare. Numbers may be any, also not finite.
    """
    kind = FLOATS.get(array.dtype)
    if kind is None or old.dtype != kind or tuple(array.shape) != old.shape:
        raise LayoutError(
            f"steps of {array.dtype[:32]}{list(array.shape)} do not fit {old.dtype}{list(old.shape)}."
        )
    data = memoryview(array.data)
    if len(data) < _HEAD.size:
        raise LayoutError(f"steps of {len(data)} bytes lack their head of {_HEAD.size}.")
    step, most, axis = _HEAD.unpack_from(data)
    if not (0 <= step < math.inf) or most > _MOST_STEPS or not math.isfinite(step * most):
        raise LayoutError(f"{most} steps of {step!r} are not possible.")
    mask, begin = _mask(data, axis, old.shape)
    counted = ~mask
    held = int(np.count_nonzero(mask))
    middle = begin + held * kind.itemsize
    needed = middle + packed_size(mask.size - held, 2 * most + 1)
    if len(data) != needed:
        raise LayoutError(f"steps of {old.dtype}{list(old.shape)} need {needed} bytes, got {len(data)}.")
    counts = unpack_digits(data[middle:], mask.size - held, 2 * most + 1).astype(np.int64) - most
    content = np.empty(mask.size, old.dtype)
    content[mask] = np.frombuffer(data[begin:middle], kind)
    with np.errstate(over="ignore", invalid="ignore"):  # Whether it is finite is asked of the whole reply.
        content[counted] = _stepped(old.reshape(-1)[counted], step, counts)
    content.flags.writeable = False
    return content.reshape(old.shape)


def _counts(new: NDArray, old: NDArray, how: StepCounts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return how many steps each number moved down."""
    moved = old.astype(np.float64) - new
    if not np.isfinite(moved).all():
        raise LayoutError("numbers that are not finite are no multiples of a step.")
    counts = np.zeros(new.shape, np.int64)
    if how.step and how.most:
        counts[...] = np.clip(np.rint(moved / how.step), -how.most, how.most)
    # Each step rounds by half a unit in the last place of the number where it is.
    farthest = (np.abs(old) + how.most * how.step).astype(new.dtype)
    if (np.abs(moved - how.step * counts) > (how.most / 2 + 1) * np.spacing(farthest)).any():
        raise LayoutError(f"numbers moved by what is no multiple of the step {how.step:g}.")
    return counts


def _stepped(old: NDArray, step: float, counts: NDArray) -> NDArray:
    moved: NDArray = (old.astype(np.float64) - step * counts).astype(old.dtype)
    return moved


def _kind(shape: tuple[Any, ...], m: int, n: int) -> int:
    kinds: dict[tuple[Any, ...], int] = {(m, n): 3, (1, n): 2, (m, 1): 1}
    return kinds[shape]


def _mask(data: memoryview, axis: int, shape: tuple[int, ...]) -> tuple[NDArray, int]:
    """Return which numbers travel as they are, flat, and where in ``data`` they begin."""
    m, n = matrix_shape(shape)
    marks = {0: (0, 0), 1: (m, 1), 2: (1, n), 3: (m, n)}.get(axis)
    if marks is None:
        raise LayoutError(f"steps with numbers along axis {axis}; use 0 to 3.")
    count = math.prod(marks)
    end = _HEAD.size + -(-count // 8)
    if len(data) < end:
        raise LayoutError(f"steps of {len(data)} bytes lack their {count} marks.")
    mask = np.zeros((m, n), bool)
    if axis:
        bits = np.unpackbits(np.frombuffer(data[_HEAD.size : end], np.uint8), count=count)
        mask |= bits.reshape(marks).astype(bool)
    return mask.reshape(-1), end
