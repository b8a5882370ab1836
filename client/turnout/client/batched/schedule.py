"""The minibatches of many clients, step by step: which rows of its data each client uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of C clients, those with more of them first, so that the clients of a step are a prefix.

    Attributes
    ----------
    rows
        Row numbers into each client's examples, shape (C, T, B). Padding is row 0. T is the number of steps,
        or 1 when every step uses the same rows.
    sizes
        Examples of each client's batch, shape (C, T); at most B.
    steps
        Number of steps of each client, shape (C,), not increasing.
    active
        Number of clients that take part in each step, shape (S,).
    """

    rows: IntArray
    sizes: IntArray
    steps: IntArray
    active: IntArray


def whole_sets(counts: IntArray, steps: int) -> Schedule:
    """Return ``steps`` steps on each client's whole set, in its own order."""
    width = int(counts.max())
    rows = np.broadcast_to(np.arange(width), (len(counts), 1, width)).copy()
    rows[rows >= counts[:, None, None]] = 0
    return Schedule(rows, counts[:, None], np.full(len(counts), steps), np.full(steps, len(counts)))


def pieces(counts: IntArray, rows: Sequence[IntArray | None], width: int) -> Schedule:
    """Return one pass over each client's examples (or its chosen ``rows``), ``width`` at a time."""
    return _cut(counts, width, -(-counts // width), lambda i, _: _order(rows[i], int(counts[i])))


def shuffled(
    counts: IntArray,
    generators: Sequence[np.random.Generator],
    *,
    batch_size: int,
    steps: int | None,
    epochs: int,
) -> Schedule:
    """Return the batches that `minibatches` yields for clients with more than ``batch_size`` examples.

    ``counts`` (C,) must not increase.
    """
    per_epoch = -(-counts // batch_size)
    total = epochs * per_epoch if steps is None else np.full(len(counts), steps)
    return _cut(counts, batch_size, total, lambda i, _: generators[i].permutation(int(counts[i])))


def _cut(counts: IntArray, width: int, steps: IntArray, order: Callable[[int, int], IntArray]) -> Schedule:
    """Cut each client's ``order(i, epoch)`` of its examples into batches, epoch after epoch."""
    longest = int(steps[0])
    rows = np.zeros((len(counts), longest, width), dtype=np.int64)
    per_epoch = -(-counts // width)
    for i, (count, stride) in enumerate(zip(counts.tolist(), (per_epoch * width).tolist(), strict=True)):
        mine = rows[i].reshape(-1)
        for epoch, start in enumerate(range(0, int(steps[i]) * width, stride)):
            place = mine[start : start + count]
            place[:] = order(i, epoch)[: len(place)]
    k = np.arange(longest)
    last = (k + 1) % per_epoch[:, None] == 0
    sizes = np.where(last, (counts - (per_epoch - 1) * width)[:, None], width)
    return Schedule(rows, sizes, steps, (steps[:, None] > k).sum(axis=0))


def _order(rows: IntArray | None, count: int) -> IntArray:
    return np.arange(count) if rows is None else rows
