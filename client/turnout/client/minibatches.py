"""Shuffled minibatches, a pure function of (seed, client, round)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from turnout.tasks.task import ClientData

_WORD: Final = 1 << 32


def generator(seed: int, client: int, server_round: int) -> np.random.Generator:
    """Return the generator of all randomness in one client's round."""
    words: Any = (seed, client, server_round)
    if max(words) < _WORD:  # The same stream: NumPy is slow to cut Python integers into words itself.
        words = np.array(words, dtype=np.uint32)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def minibatches(
    data: ClientData,
    make_rng: Callable[[], np.random.Generator],
    *,
    batch_size: int,
    steps: int | None,
    epochs: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x, y) batches: ``steps`` of them, or ``epochs`` passes when ``steps`` is None.

    Each pass is a new permutation cut into batches of ``batch_size``, the last one possibly smaller. A
    batch size that covers the whole set yields the set itself, in its own order, and needs no generator.
    """
    count = len(data)
    if batch_size >= count:
        for _ in range(epochs if steps is None else steps):
            yield data.x, data.y
        return
    rng = make_rng()
    remaining = epochs * -(-count // batch_size) if steps is None else steps
    while remaining > 0:
        order = torch.from_numpy(rng.permutation(count)).to(data.y.device)
        for start in range(0, count, batch_size):
            rows = order[start : start + batch_size]
            yield data.x.index_select(0, rows), data.y.index_select(0, rows)
            remaining -= 1
            if remaining == 0:
                return
