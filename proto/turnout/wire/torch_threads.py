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
    """Give PyTorch one thread for good, in a process that is one of several workers, and try it out.

    A forked process in which one of PyTorch's libraries was locked by a thread that is no more hangs here,
    where it is waited for, rather than in its first client.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_num_threads(1)
    image = torch.ones(1, 1, 16, 16, requires_grad=True)
    kernel, matrix = torch.ones(4, 1, 3, 3, requires_grad=True), torch.ones(784, 64, requires_grad=True)
    product = torch.nn.functional.conv2d(image, kernel, stride=1).reshape(1, -1) @ matrix
    product.sum().backward()
