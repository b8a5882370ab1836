"""Whole numbers of a small range as digits of larger numbers, so that they take fractions of a byte.

A digit of base B needs log2(B) bits. Of all ways to put k digits into b <= 8 bytes the tightest is taken: for
B = 41, say, 10 digits in 7 bytes, 5.6 bits each where log2(41) is 5.36.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np

from turnout.wire.errors import LayoutError

MOST_BASE: Final = 2**32
"""The largest base."""
_WORD_BYTES: Final = 8

_Digits = np.ndarray[Any, np.dtype[np.uint64]]


@lru_cache(maxsize=256)
def grouping(base: int) -> tuple[int, int]:
    """Return (k, b): k digits of ``base``, from 2 to `MOST_BASE`, go into b bytes."""
    best = (1, _WORD_BYTES)
    for size in range(1, _WORD_BYTES + 1):
        count, room = 0, 256**size
        while room >= base:
            count, room = count + 1, room // base
        if count * best[1] > best[0] * size:
            best = (count, size)
    return best


def packed_size(count: int, base: int) -> int:
    """Return the bytes of ``count`` digits: ``b ceil(count / k)``, none in base 1."""
    if base == 1:
        return 0
    digits, size = grouping(base)
    return -(-count // digits) * size


def pack_digits(values: np.ndarray[Any, Any], base: int) -> bytes:
    """Pack whole numbers from 0 to ``base - 1``, shape (n,)."""
    if base == 1:
        return b""
    digits, size = grouping(base)
    groups = -(-len(values) // digits)
    padded = np.zeros(groups * digits, np.uint64)
    padded[: len(values)] = values
    columns = padded.reshape(groups, digits)
    words = np.zeros(groups, np.uint64)
    for place in range(digits - 1, -1, -1):
        words *= np.uint64(base)
        words += columns[:, place]
    return words.astype("<u8").view(np.uint8).reshape(groups, _WORD_BYTES)[:, :size].tobytes()


def unpack_digits(data: bytes | memoryview, count: int, base: int) -> _Digits:
    """Return ``count`` digits that `pack_digits` packed, shape (count,).

    Raises `LayoutError` for another number of bytes, and for bytes that are no digits of ``base``.
    """
    if len(data) != packed_size(count, base):
        raise LayoutError(
            f"{count} digits of base {base} are {packed_size(count, base)} bytes, got {len(data)}."
        )
    if base == 1:
        return np.zeros(count, np.uint64)
    digits, size = grouping(base)
    groups = len(data) // size
    wide = np.zeros((groups, _WORD_BYTES), np.uint8)
    wide[:, :size] = np.frombuffer(data, np.uint8).reshape(groups, size)
    words = wide.reshape(-1).view("<u8").astype(np.uint64, copy=False)
    columns = np.empty((groups, digits), np.uint64)
    for place in range(digits):
        quotient = words // np.uint64(base)
        columns[:, place] = words - quotient * np.uint64(base)
        words = quotient
    if words.any():
        raise LayoutError(f"the bytes are no digits of base {base}.")
    return columns.reshape(-1)[:count]
