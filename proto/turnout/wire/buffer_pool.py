"""Large buffers that are used again: the first pass over fresh memory costs more than copying into it."""

from __future__ import annotations

import sys
from typing import Protocol

import numpy as np

from turnout.wire.arrays import NDArray


class Holder(Protocol):
    """Whoever has a buffer of the pool."""

    def release(self) -> NDArray:
        """Return the buffer and forget it."""


class BufferPool:
    """At most ``slots`` free buffers that are used again; ``allocations`` counts how many were made."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free: list[NDArray] = []
        self.allocations = 0

    def take(self, size: int) -> NDArray:
        """Return a buffer of at least ``size`` bytes, aligned for any element; its content is undefined."""
        for index, buffer in enumerate(self._free):
            if size <= buffer.size <= 2 * size:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        self.allocations += 1
        return np.empty(size, np.uint8)

    def give(self, holder: Holder) -> None:
        """Take the holder's buffer back, unless someone still reads it: who kept a view of it keeps it."""
        buffer, references = _released(holder)
        if references == _UNSHARED and len(self._free) < self._slots:
            self._free.append(buffer)


def _released(holder: Holder) -> tuple[NDArray, int]:
    buffer = holder.release()
    return buffer, sys.getrefcount(buffer)


class _Sample:
    def __init__(self) -> None:
        self.buffer: NDArray = np.empty(1, np.uint8)

    def release(self) -> NDArray:
        buffer, self.buffer = self.buffer, np.empty(0, np.uint8)
        return buffer


def _unshared() -> int:
    """Return what `_released` counts for a buffer that nobody else has; -1 if views do not count."""
    alone, viewed = _Sample(), _Sample()
    view = viewed.buffer[:]
    count = _released(alone)[1]
    seen = _released(viewed)[1] > count
    del view
    return count if seen else -1


_UNSHARED = _unshared()
