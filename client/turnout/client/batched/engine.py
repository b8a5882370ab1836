"""What computes the clients' gradients, and which one is used for a model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from turnout.client.batched.batches import Batch
from turnout.client.batched.stacked_model import StackedModel
from turnout.client.batched.vmap_engine import VmapEngine
from turnout.tasks.task import Task


class Engine(Protocol):
    """Losses and gradients of the models of a `StackedModel` on a batch."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of each client of ``batch``, shape (a,)."""

    def gradient(self, batch: Batch, *, accumulate: bool = False) -> Tensor:
        """Put (or add) the gradients into the model's, rows of the batch's clients; return their losses.

        Losses and gradients are weighted means, see `Batch`.
        """


def choose_engine(task: Task, model: StackedModel) -> Engine:
    """Return the fastest engine that computes this task's loss of this model."""
    return VmapEngine(task, model)
