"""Work on long vectors in cache-sized blocks, on two threads when they are long enough to gain from it.

NumPy releases the interpreter lock inside its loops, and adding up models is bound by memory, which one
core of a server rarely saturates. Blocks do not depend on the number of threads, so neither do results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

T = TypeVar("T")

# Elements per block: a float32 block, a float64 scratch and an accumulator block share a core's cache.
BLOCK: Final = 65_536
_PARALLEL_FROM: Final = 16 * BLOCK
_THREADS: Final = 2
_pool: list[ThreadPoolExecutor] = []
# Threads do not survive a fork; the child makes its own when it needs them.
os.register_at_fork(after_in_child=_pool.clear)


def blockwise(size: int, work: Callable[[int, int], list[T]]) -> list[T]:
    """Return what ``work(start, stop)`` gives over the range ``[0, size)``, in the order of the range.

    ``work`` is called on consecutive pieces, possibly at the same time; it goes through its piece in steps of
    `BLOCK`. Pieces begin at multiples of `BLOCK`.
    """
    if size < _PARALLEL_FROM or (os.cpu_count() or 1) < _THREADS:
        return work(0, size)
    if not _pool:
        _pool.append(ThreadPoolExecutor(_THREADS - 1, thread_name_prefix="turnout-blocks"))
    middle = size // (2 * BLOCK) * BLOCK
    other = _pool[0].submit(work, middle, size)
    try:
        first = work(0, middle)
    finally:
        wait([other])  # Nobody may find the other half still being written, even after an error.
    return first + other.result()
