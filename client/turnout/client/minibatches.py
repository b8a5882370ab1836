"""Shuffled minibatches, a pure function of (seed, client, round)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from turnout.tasks.task import ClientData

_WORD: Final = 1 << 32
# Bytes of minibatches gathered in one call: they should still be in the cache when they are used.
_GATHERED: Final = 1 << 19


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
    row_bytes = data.x[:1].nbytes + data.y[:1].nbytes
    gathered = batch_size * max(1, _GATHERED // (batch_size * max(1, row_bytes)))
    remaining = epochs * -(-count // batch_size) if steps is None else steps
    while remaining > 0:
        order = torch.from_numpy(rng.permutation(count)).to(data.y.device)
        for rows in torch.split(order[: remaining * batch_size], gathered):
            x, y = data.x.index_select(0, rows), data.y.index_select(0, rows)
            yield from zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
        remaining -= -(-count // batch_size)
