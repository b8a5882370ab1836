"""Quantized weights as they are stored: codes of a byte or less under scales (ECO, arXiv 2601.22101).

A weight is its code times the scale of its row or block. The bytes: the number of scales (4), the largest
code (4, 0 for 8-bit floats); the scales; the codes, whole numbers from -most to most as digits (see
`turnout.wire.digits`: a byte each for 8 bits, half a byte for 4), or e4m3 floats of a byte.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from flwr.app import Array

from turnout.wire.declared import FLOATS, elements
from turnout.wire.digits import MOST_BASE, pack_digits, packed_size, unpack_digits
from turnout.wire.errors import LayoutError
from turnout.wire.flower import dtype_name

GRID_STYPE: Final = "turnout.grid-codes"
_NDArray = np.ndarray[Any, np.dtype[Any]]
_HEAD: Final = struct.Struct("<II")
_MOST_CODE: Final = (MOST_BASE - 1) // 2


def _e4m3() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the numbers of the 256 bytes: a sign, four bits of exponent (bias 7), three of mantissa."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    size[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -size, size).astype(np.float32)


_E4M3: Final = _e4m3()


def as_grid_array(codes: _NDArray, scales: _NDArray) -> Array:
    """Encode weights ``codes * scales``: ``scales`` (S,) are those of consecutive stretches of equal length.

    Codes are whole numbers (int64), or the bytes of e4m3 floats (uint8). The weights' dtype is that of the
    scales, float32 or float64.
    """
    flat, pieces = codes.reshape(-1), [np.asarray(scales, scales.dtype.newbyteorder("<")).tobytes()]
    most = 0
    if codes.dtype == np.uint8:
        pieces.append(flat.tobytes())
    else:
        most = max(1, int(np.abs(flat).max(initial=1)))
        pieces.append(pack_digits(flat + most, 2 * most + 1))
    data = b"".join([_HEAD.pack(len(scales), most), *pieces])
    return Array(dtype_name(scales.dtype), tuple(codes.shape), GRID_STYPE, data)


def grid_view(array: Array) -> _NDArray:
    """Return the weights of an array of `as_grid_array`, read-only.

    Raises `LayoutError` when the bytes do not hold what they declare. Scales may be any, also not finite.
    """
    count, kind, data = elements(array), FLOATS.get(array.dtype), memoryview(array.data)
    if kind is None or len(data) < _HEAD.size:
        raise LayoutError(f"codes of {array.dtype[:32]} in {len(data)} bytes; use {', '.join(FLOATS)}.")
    stretches, most = _HEAD.unpack_from(data)
    middle = _HEAD.size + stretches * kind.itemsize
    size = count if most == 0 else packed_size(count, min(2 * most + 1, MOST_BASE))
    # Never base 1: a declared shape has bytes to show for it.
    if most > _MOST_CODE or (count % stretches if stretches else count) or len(data) != middle + size:
        raise LayoutError(
            f"{count} codes up to {most} under {stretches} scales do not lie in {len(data)} bytes."
        )
    weights: _NDArray
    scales = np.frombuffer(data[_HEAD.size : middle], kind)
    if most == 0:
        weights = _E4M3[np.frombuffer(data[middle:], np.uint8)].astype(kind)
    else:
        weights = (unpack_digits(data[middle:], count, 2 * most + 1).astype(np.int64) - most).astype(kind)
    if stretches:
        with np.errstate(over="ignore", invalid="ignore"):  # Whether it is finite is asked of the reply.
            weights.reshape(stretches, -1)[...] *= scales[:, np.newaxis]
    weights = weights.reshape(array.shape)
    weights.flags.writeable = False
    return weights
