"""Memory that one process writes and its relatives read: blocks in an anonymous file, passed on by reference.

Each process has one `SharedHeap`, made before the processes part, of which it is the only writer. A `Ref`
travels in a message instead of the bytes; whoever gets it reads the block in place.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from turnout.wire.arrays import NDArray

_EXTENT: Final = 1 << 20
_ALIGNMENT: Final = 64


class Ref(NamedTuple):
    """Where a block lies: which heap, which extent of its file (offset and size), where in the extent."""

    heap: int
    extent: int
    extent_size: int
    offset: int


class SharedHeap:
    """A growing file in memory, cut into extents of equal blocks; freed blocks are used again.

    Sizes are rounded up to a few classes, so that blocks fit others later; pages never touched take no
    memory. Raises OSError when the system has no memory left.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._file = os.memfd_create(f"turnout-heap-{number}", os.MFD_CLOEXEC)
        self._size = 0
        self._free: dict[int, list[Ref]] = {}
        self._extents: dict[int, NDArray] = {}

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file

    def adopt(self) -> None:
        """Become the heap's writer: go on behind everything that an earlier writer has put there."""
        self._size = os.fstat(self._file).st_size
        self._free.clear()

    def allocate(self, nbytes: int) -> Ref:
        """Return a block of at least ``nbytes``, aligned to 64 bytes, its content undefined."""
        size = _size_class(nbytes)
        free = self._free.setdefault(size, [])
        if not free:
            # Larger and larger extents: a process has only so many files and mappings.
            extent = max(max(_EXTENT, self._size // 4) // size * size, size)
            extent = -(-extent // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._file, self._size + extent)
            starts = range(0, extent - size + 1, size)
            free.extend(Ref(self.number, self._size, extent, start) for start in reversed(starts))
            self._size += extent
        return free.pop()

    def release(self, ref: Ref, nbytes: int) -> None:
        """Take back a block that `allocate` gave for ``nbytes``; nobody may read it any more."""
        self._free.setdefault(_size_class(nbytes), []).append(ref)

    def array(self, ref: Ref, dtype: Any, shape: Sequence[int]) -> NDArray:
        """Return the block as an array. Only the heap's owner may write to it."""
        block = self._extents.get(ref.extent)
        if block is None:
            mapped = mmap.mmap(self._file, ref.extent_size, offset=ref.extent)
            block = self._extents[ref.extent] = np.frombuffer(mapped, np.uint8)
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        piece = block[ref.offset : ref.offset + count * dtype.itemsize]
        array: NDArray = piece.view(dtype).reshape(shape)
        return array

    def put(self, array: NDArray) -> Ref:
        """Copy ``array`` into a new block."""
        ref = self.allocate(array.nbytes)
        self.array(ref, array.dtype, array.shape)[...] = array
        return ref

    def close(self) -> None:
        """Let the file go; blocks that are still mapped live on until they are dropped."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._extents.clear()


def _size_class(nbytes: int) -> int:
    """Round up to 1, 1.25, 1.5 or 1.75 times a power of two: few classes, at most a quarter too large."""
    if nbytes <= _ALIGNMENT:
        return _ALIGNMENT
    step = max(_ALIGNMENT, 1 << ((nbytes - 1).bit_length() - 3))
    return -(-nbytes // step) * step
