"""One client's work in one round: what a local update is given, and the steps that local updates share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from turnout.client.flat_model import FlatModel
from turnout.client.minibatches import generator, minibatches
from turnout.client.options import TrainOptions
from turnout.client.state import ClientState
from turnout.tasks.task import ClientData, Task, Vector
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError

_GRADIENT_CHUNK: Final = 2048


@dataclass(slots=True)
class Outcome:
    """What a local update sends back: named records, and the mean loss it saw on its way."""

    records: dict[str, ArrayRecord]
    train_loss: float


@dataclass(slots=True)
class LocalRound:
    """Everything a local update works with.

    ``model`` holds the received global model; a local update may change it freely. ``content`` is the
    request's and shared with other clients: read only.
    """

    client: int
    server_round: int
    local_update: str
    model: FlatModel
    task: Task
    data: ClientData
    options: TrainOptions
    lr: float
    config: ConfigRecord
    content: RecordDict
    state: ClientState

    def generator(self, server_round: int | None = None) -> np.random.Generator:
        """Return a new generator of this client's randomness in ``server_round`` (None: the request's)."""
        return generator(
            self.options.seed, self.client, self.server_round if server_round is None else server_round
        )

    def number(self, key: str, *, positive: bool = False) -> float:
        """Return the number ``key`` of the request; `ConfigError` if missing or out of range."""
        if key not in self.config:
            raise ConfigError(
                f"local update {self.local_update!r} needs {key!r} in the request's config; "
                "the strategy must send it."
            )
        value = self.config[key]
        check_number(key, value, low=0, open_low=positive)
        assert isinstance(value, (int, float))
        return float(value)

    def flag(self, key: str) -> bool:
        """Return whether the request sets ``key``."""
        return bool(self.config.get(key, False))

    def extra(self, key: str) -> Vector | None:
        """Return the request's record ``key`` as a vector, shape (P,), or None when there is none."""
        record = self.content.get(key)
        if not isinstance(record, ArrayRecord):
            return None
        return self.model.layout.flatten(record, with_buffers=False)

    def needed(self, key: str) -> Tensor:
        """Return the request's record ``key`` as a tensor, shape (P,); `ConfigError` when there is none."""
        vector = self.extra(key)
        if vector is None:
            raise ConfigError(
                f"local update {self.local_update!r} needs the record {key!r}; the strategy must send it."
            )
        return self.model.tensor(vector)

    def require_plain_sgd(self) -> None:
        """Raise `ConfigError` unless steps are plain SGD, which this local update's formula assumes."""
        if not self.options.plain_sgd:
            raise ConfigError(
                f"local update {self.local_update!r} is defined by plain SGD steps, but optimizer="
                f"{self.options.optimizer!r} and momentum={self.options.momentum}; use optimizer='sgd' and "
                "momentum=0."
            )

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Put the gradient of the mean loss on a batch into ``model.gradient``; return that loss."""
        model = self.model
        model.gradient.zero_()
        loss = self.task.loss(model.module(model.inputs(x)), y)
        torch.autograd.backward(loss)
        if self.options.weight_decay:
            self._add_weight_decay()
        return loss.detach()

    def large_batch_gradient(self, rows: Tensor | None = None) -> Tensor:
        """Put the mean gradient over ``rows`` (None: all) into ``model.gradient``; return the loss.

        Works through the examples in chunks, so that memory does not grow with the client's data.
        """
        x, y = self.data.x, self.data.y
        if rows is not None:
            x, y = x.index_select(0, rows), y.index_select(0, rows)
        if len(y) <= _GRADIENT_CHUNK:
            return self.gradient(x, y)
        model = self.model
        model.gradient.zero_()
        total = torch.zeros((), dtype=model.parameters.dtype, device=model.parameters.device)
        for start in range(0, len(y), _GRADIENT_CHUNK):
            piece = slice(start, start + _GRADIENT_CHUNK)
            loss = self.task.loss(model.module(model.inputs(x[piece])), y[piece]) * (len(y[piece]) / len(y))
            torch.autograd.backward(loss)
            total += loss.detach()
        if self.options.weight_decay:
            self._add_weight_decay()
        return total

    def batches(self, server_round: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield minibatches of one local training, ordered as in ``server_round`` (None: the request's)."""
        o = self.options
        return minibatches(
            self.data,
            lambda: self.generator(server_round),
            batch_size=o.batch_size,
            steps=o.local_steps,
            epochs=o.local_epochs or 1,
        )

    def _add_weight_decay(self) -> None:
        if self.options.own_sgd:  # Other optimizers decay the weights themselves.
            self.model.gradient.add_(self.model.parameters, alpha=self.options.weight_decay)
