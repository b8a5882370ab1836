"""Receiving a reply: a buffer that is filled in order and checked while it is hot in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.checksums import add_chunk
from turnout.wire.errors import ReplyRejected
from turnout.wire.framing import CHUNK_BYTES, Chunk

_BF16_EXPONENT: Final = np.uint16(0x7F80)
_DTYPES: Final = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


class Receipt:
    """One body being received. Chunks must come in order, in full size, and hold finite numbers."""

    def __init__(
        self, buffer: NDArray, size: int, checksum: int, runs: Sequence[tuple[str, int, int]]
    ) -> None:
        self.buffer = buffer
        self.size = size
        self.received = 0
        self._checksum = checksum
        self._crc = 0
        self._runs = runs

    def release(self) -> NDArray:
        """Return the buffer and forget it."""
        buffer, self.buffer = self.buffer, np.empty(0, np.uint8)
        return buffer

    def add(self, chunk: Chunk) -> bool:
        """Store one chunk; return whether the body is complete. Raises `ReplyRejected`."""
        begin, length = self.received, len(chunk.data)
        if chunk.offset != begin or length != min(CHUNK_BYTES, self.size - begin) or not length:
            raise ReplyRejected(
                "bad-chunk",
                f"a chunk of {length} bytes at {chunk.offset}, expected at {begin} of {self.size}.",
            )
        self.buffer[begin : begin + length] = np.frombuffer(chunk.data, np.uint8)
        self._crc = add_chunk(self._crc, chunk.data)
        self.received = end = begin + length
        check_finite(self.buffer, self._runs, begin, end)
        if end < self.size:
            return False
        if self._crc != self._checksum:
            raise ReplyRejected("damaged", "the reply's checksum does not match its bytes.")
        return True


def check_finite(buffer: NDArray, runs: Sequence[tuple[str, int, int]], begin: int, end: int) -> None:
    """Raise `ReplyRejected` if a float in ``buffer[begin:end]`` is NaN or infinite.

    ``begin`` and ``end`` cut no element: they are multiples of a chunk's size or the body's end.
    """
    for kind, first, last in runs:
        low, high = max(begin, first), min(end, last)
        if low < high and not _finite(buffer[low:high], kind):
            raise ReplyRejected("non-finite", f"bytes {low} to {high} hold a {kind} that is NaN or infinite.")


def _finite(raw: NDArray, kind: str) -> bool:
    if kind == "bfloat16":
        return not bool(np.any((raw.view(np.uint16) & _BF16_EXPONENT) == _BF16_EXPONENT))
    values: np.ndarray[Any, Any] = raw.view(_DTYPES[kind])
    if kind != "float16":
        # The sum of squares is finite unless a value is not, or squares overflow: four times as fast.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(values, values)):
                return True
    return bool(np.isfinite(values).all())
