"""ndarrays to Flower ``Array`` objects and back without copying where the bytes allow it."""

from __future__ import annotations

import tokenize
from io import BytesIO
from typing import Any, Final

import numpy as np
from flwr.app import Array

from turnout.wire.declared import elements
from turnout.wire.errors import LayoutError
from turnout.wire.flower import NUMPY_STYPE, LazyArray, dtype_name
from turnout.wire.grid_codes import GRID_STYPE, grid_view

NDArray = np.ndarray[Any, np.dtype[Any]]
"""A NumPy array of any shape and dtype."""

BF16_STYPE: Final = "turnout.bf16"
SIGN_STYPE: Final = "turnout.sign"
LEADING_STYPE: Final = "turnout.leading"
_LEADING_KINDS: Final = {f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)}
_READERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What NumPy's header reader lets out on crafted bytes, which come from the network.
_UNREADABLE: Final = (
    ValueError, KeyError, TypeError, EOFError, OverflowError, MemoryError, RecursionError, SyntaxError,
    tokenize.TokenError,
)  # fmt: skip


def as_array(ndarray: NDArray) -> Array:
    """Wrap ``ndarray`` as a Flower ``Array`` without copying; encoding waits until a transport needs it.

    The caller must not change ``ndarray`` afterwards.
    """
    return LazyArray(ndarray)


def as_bf16_array(ndarray: NDArray) -> Array:
    """Encode a float32 array as bfloat16 (round to nearest even), which NumPy and ``.npy`` cannot express."""
    bits = np.ascontiguousarray(ndarray, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(ndarray)
    if nan.any():  # Rounding up could turn a NaN's payload into infinity.
        rounded[nan] = 0x7FC0
    return Array("bfloat16", tuple(ndarray.shape), BF16_STYPE, rounded.tobytes())


def as_sign_array(ndarray: NDArray) -> Array:
    """Encode only the signs of a float32 array, one bit each: ``ceil(n / 8)`` bytes for n numbers.

    `view` gives back +1 where a number was 0 or more, and -1 elsewhere, as float32.
    """
    bits = np.packbits(ndarray.reshape(-1) >= 0)
    return Array("float32", tuple(ndarray.shape), SIGN_STYPE, bits.tobytes())


def as_leading_array(ndarray: NDArray) -> Array:
    """Encode the numbers up to the last one that is not zero, in row-major order: all that follow are zeros.

    Lossless (a negative zero is a number). Without zeros at its end the array is wrapped as by `as_array`.
    """
    flat = np.ascontiguousarray(ndarray).reshape(-1)
    used = flat.view(f"u{flat.itemsize}")[::-1] != 0
    count = flat.size - int(used.argmax()) if used.any() else 0
    if count == flat.size:
        return as_array(ndarray)
    data = np.asarray(flat[:count], flat.dtype.newbyteorder("<")).tobytes()
    return Array(dtype_name(flat.dtype), tuple(ndarray.shape), LEADING_STYPE, data)


def leading_view(array: Array) -> NDArray:
    """Return the content of an array of `as_leading_array`, read-only.

    A few bytes may declare a large shape: compare it with what is expected before. `view` does not read such
    arrays for that reason. Raises `LayoutError` when the bytes do not hold what the array declares.
    """
    count, kind = elements(array), _LEADING_KINDS.get(array.dtype)
    if kind is None or len(array.data) % kind.itemsize or len(array.data) > count * kind.itemsize:
        raise LayoutError(
            f"array of {array.dtype[:32]}{list(array.shape)} without its last zeros holds {len(array.data)} "
            f"bytes; send whole numbers of {', '.join(_LEADING_KINDS)}, at most as many as its shape has."
        )
    content = np.zeros(count, kind)
    head = np.frombuffer(array.data, kind)
    content[: len(head)] = head
    content.flags.writeable = False
    return content.reshape(array.shape)


def view(array: Array) -> NDArray:
    """Return the content of ``array`` as a read-only ndarray, without copying where the bytes are its own.

    bfloat16 and signs come back as float32, codes of a grid as the numbers that they stand for. Raises
    `LayoutError` when the bytes do not hold what the array declares.
    """
    if isinstance(array, LazyArray):
        return array.ndarray
    if array.stype == NUMPY_STYPE:
        return _npy_view(array)
    if array.stype == BF16_STYPE:
        return _bf16_view(array)
    if array.stype == SIGN_STYPE:
        return _sign_view(array)
    if array.stype == GRID_STYPE:
        return grid_view(array)
    raise LayoutError(
        f"array has stype {array.stype!r}, which cannot be read; use {NUMPY_STYPE!r}, {BF16_STYPE!r}, "
        f"{SIGN_STYPE!r} or {GRID_STYPE!r}."
    )


def _npy_view(array: Array) -> NDArray:
    stream = BytesIO(array.data)
    try:
        shape, fortran, dtype = _READERS[np.lib.format.read_magic(stream)](stream)
    except _UNREADABLE as error:
        raise LayoutError(f"array data is not a readable .npy block: {error!r}") from error
    if dtype.kind not in "fiub":
        raise LayoutError(f"array has dtype {dtype}, expected a float, integer or bool.")
    count, offset = elements(array), stream.tell()
    if tuple(shape) != tuple(array.shape) or len(array.data) - offset != count * dtype.itemsize:
        raise LayoutError(
            f"array declares shape {tuple(array.shape)} but its data holds shape {tuple(shape)} in "
            f"{len(array.data) - offset} bytes."
        )
    flat = np.frombuffer(array.data, dtype=dtype, count=count, offset=offset)
    return flat.reshape(shape, order="F" if fortran else "C")


def _bf16_view(array: Array) -> NDArray:
    count = elements(array)
    if len(array.data) != 2 * count:
        raise LayoutError(
            f"bfloat16 array of shape {tuple(array.shape)} needs {2 * count} bytes, got {len(array.data)}."
        )
    bits = np.frombuffer(array.data, dtype=np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(array.shape)


def _sign_view(array: Array) -> NDArray:
    count = elements(array)
    if len(array.data) != -(-count // 8):
        raise LayoutError(
            f"sign array of shape {tuple(array.shape)} needs {-(-count // 8)} bytes, got {len(array.data)}."
        )
    bits = np.unpackbits(np.frombuffer(array.data, dtype=np.uint8), count=count)
    signs = np.where(bits, np.float32(1), np.float32(-1)).reshape(array.shape)
    signs.flags.writeable = False
    return signs
