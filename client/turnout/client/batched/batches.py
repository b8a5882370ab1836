"""Batches of many clients as tensors: gathered for several steps at once, in buffers that are used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from turnout.client.batched.schedule import IntArray, Schedule
from turnout.tasks.task import ClientData

# Gathering one client at a time saves a copy, all at once saves calls; this decides, in bytes per client.
_JOINED: Final = 1 << 16
# Bytes of the examples gathered at once: they should still be in the (shared) cache when they are used.
_WINDOW: Final = {"cpu": 1 << 21, "cuda": 1 << 28}


@dataclass(frozen=True, slots=True)
class Kind:
    """Shape of one example and its target, and their dtypes."""

    x_shape: tuple[int, ...]
    x_dtype: torch.dtype
    y_shape: tuple[int, ...]
    y_dtype: torch.dtype


@dataclass(slots=True)
class Batch:
    """One step's examples of the first ``a`` clients of a chunk, padded to the largest batch among them.

    Attributes
    ----------
    x, y
        Inputs (a, w, ...) and targets (a, w, ...).
    sizes
        Examples that count, shape (a,); the rest is padding.
    weights
        Weight of each example in its client's loss, shape (a, w), 0 for padding; None is ``1 / w`` for all.
    shares
        Sum of each client's weights when it is not 1, shape (a,).
    """

    x: Tensor
    y: Tensor
    sizes: IntArray
    weights: Tensor | None
    shares: np.ndarray[Any, np.dtype[np.float64]] | None = None


class ClientExamples:
    """One client's examples, an example being one row. Clients of one ``kind`` can be trained together."""

    def __init__(self, data: ClientData) -> None:
        self.data = data
        self.count = len(data)
        self.kind = Kind(tuple(data.x.shape[1:]), data.x.dtype, tuple(data.y.shape[1:]), data.y.dtype)
        self.x, self.y = data.x.reshape(self.count, -1), data.y.reshape(self.count, -1)


class Examples:
    """The examples of the clients of one chunk, all of one kind."""

    def __init__(self, clients: Sequence[ClientExamples]) -> None:
        self.counts: IntArray = np.array([client.count for client in clients])
        self._x, self._y = [client.x for client in clients], [client.y for client in clients]
        self._kind = clients[0].kind
        x, y = self._x[0], self._y[0]
        self.device = x.device
        self._row_bytes = x.shape[1] * x.element_size() + y.shape[1] * y.element_size()
        small = int(self.counts.sum()) * self._row_bytes < _JOINED * len(clients)
        if len(clients) > 1 and (small or self.device.type != "cpu"):
            self._x, self._y = [torch.cat(self._x)], [torch.cat(self._y)]
            self._starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    def batches(
        self, schedule: Schedule, dtype: torch.dtype, totals: IntArray | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of ``schedule``. They share buffers: each is valid until the next is asked for.

        An example weighs one over its batch's size, or one over its client's number in ``totals``.
        """
        rows, sizes = schedule.rows, schedule.sizes
        count, kept, width = rows.shape
        window = max(1, _WINDOW[self.device.type] // (count * width * self._row_bytes))
        weights = _weights(schedule, dtype, self.device, totals)
        x = y = torch.empty(0)
        for k, active in enumerate(schedule.active.tolist()):
            at = k % kept
            if k < kept and k % window == 0:
                x, y = self._gather(rows[:active, k : k + window])
            a_sizes = sizes[:active, at]
            w = int(a_sizes.max())
            uneven = totals is not None or int(a_sizes.min()) != w
            yield Batch(
                x[:active, at % window, :w],
                y[:active, at % window, :w],
                a_sizes,
                weights[:active, at, :w] if uneven and weights is not None else None,
                None if totals is None else a_sizes / totals[:active],
            )

    def _gather(self, rows: IntArray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of ``rows`` (a, W, B), shapes (a, W, B, ...)."""
        if len(self._x) < len(self.counts):
            rows = rows + self._starts[: len(rows), None, None]
            index = torch.from_numpy(rows.reshape(-1)).to(self.device)
            x, y = self._x[0].index_select(0, index), self._y[0].index_select(0, index)
        else:
            x = self._x[0].new_empty((rows[0].size * len(rows), self._x[0].shape[1]))
            y = self._y[0].new_empty((rows[0].size * len(rows), self._y[0].shape[1]))
            for i, mine in enumerate(torch.from_numpy(rows)):
                place = slice(i * rows[0].size, (i + 1) * rows[0].size)
                torch.index_select(self._x[i], 0, mine.reshape(-1), out=x[place])
                torch.index_select(self._y[i], 0, mine.reshape(-1), out=y[place])
        return x.view(*rows.shape, *self._kind.x_shape), y.view(*rows.shape, *self._kind.y_shape)


def _weights(
    schedule: Schedule, dtype: torch.dtype, device: torch.device, totals: IntArray | None
) -> Tensor | None:
    """Return the weight of each example, shape (C, T, B); None when all batches of a step are alike."""
    sizes = schedule.sizes
    if totals is None and (sizes == sizes[:1]).all():
        return None
    counted = np.arange(schedule.rows.shape[2]) < sizes[:, :, None]
    weights = counted / (sizes[:, :, None] if totals is None else totals[:, None, None])
    return torch.from_numpy(weights).to(device, dtype)
