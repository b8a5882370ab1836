"""One PyTorch thread per client, without importing PyTorch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_THREADS: Final = "OMP_NUM_THREADS"


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Give PyTorch one thread on this thread: their number changes the order of its sums, so the bits.

    An app that imports PyTorch only now gets it with one thread, for good.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        given = os.environ.get(_THREADS)
        os.environ[_THREADS] = "1"  # Read when PyTorch is loaded.
        try:
            yield
        finally:
            if given is None:
                os.environ.pop(_THREADS, None)
            else:
                os.environ[_THREADS] = given
        return
    threads = torch.get_num_threads()
    if threads == 1:
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
