"""One PyTorch thread per client, without importing PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Give PyTorch one thread on this thread: their number changes the order of its sums, so the bits."""
    torch = sys.modules.get("torch")
    threads = 1 if torch is None else torch.get_num_threads()
    if torch is None or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def use_one_torch_thread() -> None:
    """Give PyTorch one thread for good, in a process that is one of several workers."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
