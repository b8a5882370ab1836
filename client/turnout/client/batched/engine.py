"""What computes the clients' gradients, and which one is used for a model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from turnout.client.batched.batches import Batch, Kind
from turnout.client.batched.layered_engine import LayeredEngine
from turnout.client.batched.layers.sequence import sequence_of
from turnout.client.batched.stacked_model import StackedModel
from turnout.client.batched.vmap_engine import VmapEngine
from turnout.client.batched.workspace import Workspace
from turnout.tasks.losses import LossName, loss_name
from turnout.tasks.task import Task


class Engine(Protocol):
    """Losses and gradients of the models of a `StackedModel` on a batch: weighted means, see `Batch`.

    ``numbers`` is about how many it holds for each example; ``alone`` whether a client that has the CPU to
    itself is treated in a way of its own, which pays when the batch is large.
    """

    numbers: int
    alone: bool

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of each client of ``batch``, shape (a,)."""

    def gradient(self, batch: Batch, *, accumulate: bool = False) -> Tensor:
        """Put (or add) the gradients into the model's, rows of the batch's clients; return their losses."""

    def sgd_step(self, batch: Batch, lr: float, keep: float) -> Tensor:
        """Set the parameters y to ``keep * y - lr * gradient``; return the losses before, shape (a,)."""


def choose_engine(task: Task, model: StackedModel, kind: Kind) -> Engine:
    """Return the fastest engine that computes this task's loss of this model on such examples."""
    loss, dtype = loss_name(task), model.template.parameters.dtype
    if loss is not None and kind.x_dtype == dtype:
        space = Workspace(model.template.parameters)
        layers = sequence_of(model.module, kind.x_shape, space)
        if layers is not None and _fits(loss, kind, layers[-1].outputs, dtype):
            return LayeredEngine(loss, layers, model, space)
    return VmapEngine(task, model, kind.x_shape)


def _fits(loss: LossName, kind: Kind, outputs: int, dtype: torch.dtype) -> bool:
    """Return whether the targets are those of the plain form of ``loss``."""
    if loss == "cross-entropy":
        return kind.y_shape == () and kind.y_dtype == torch.int64
    return kind.y_shape == (outputs,) and kind.y_dtype == dtype
