"""Gradients of any module for many clients at once, by ``torch.func``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from turnout.client.batched.batches import Batch
from turnout.client.batched.schedule import IntArray
from turnout.client.batched.stacked_model import StackedModel
from turnout.tasks.task import Task

_LAYERS: Final = 8  # A guess at the size of the activations, in inputs.


class VmapEngine:
    """Loss and gradient of the task's own module and loss.

    What a loss does with padding cannot be known: clients whose batches differ in size go in calls of their
    own.
    """

    alone = True

    def __init__(self, task: Task, model: StackedModel, x_shape: tuple[int, ...]) -> None:
        self._model = model
        self.numbers = _LAYERS * math.prod(x_shape)
        trained = {name for name, p in model.module.named_parameters() if p.requires_grad}

        def objective(free: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return task.loss(functional_call(model.module, free | fixed, (x,)), y)

        self._trained = trained
        self._objective = objective
        self._loss = vmap(objective)
        self._gradient: Any = vmap(grad_and_value(objective))

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of each client of ``batch``, shape (a,)."""
        with torch.no_grad():
            losses = [
                self._loss(*self._parameters(rows), batch.x[rows, :size], batch.y[rows, :size])
                for rows, size in _runs(batch.sizes)
            ]
        return torch.cat(losses)

    def gradient(self, batch: Batch, *, accumulate: bool = False) -> Tensor:
        """Put (or add) the gradients into the model's, rows of the batch's clients; return their losses."""
        losses = []
        for rows, size in _runs(batch.sizes):
            grads, loss = self._differentiate(rows, batch.x[rows, :size], batch.y[rows, :size])
            share = None
            if batch.shares is not None:
                share = torch.as_tensor(batch.shares[rows], dtype=loss.dtype, device=loss.device)
                loss = loss * share
            losses.append(loss)
            for name, place in self._model.split(self._model.gradient[rows]).items():
                if name not in grads:
                    if not accumulate:
                        place.zero_()
                    continue
                grad = (
                    grads[name] if share is None else grads[name] * share.view(-1, *[1] * (place.dim() - 1))
                )
                place.add_(grad) if accumulate else place.copy_(grad)
        return torch.cat(losses)

    def sgd_step(self, batch: Batch, lr: float, keep: float) -> Tensor:
        """Set the parameters y to ``keep * y - lr * gradient``; return the losses before, shape (a,)."""
        losses = self.gradient(batch)
        y = self._model.parameters[: len(losses)]
        if keep != 1.0:
            y.mul_(keep)
        y.add_(self._model.gradient[: len(losses)], alpha=-lr)
        return losses

    def _differentiate(self, rows: slice, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return gradients by name, shape (a, ...), and losses (a,)."""
        free, fixed = self._parameters(rows)
        if len(x) > 1:
            grads, losses = self._gradient(free, fixed, x, y)
            return grads, losses
        leaves = {name: view[0].detach().requires_grad_() for name, view in free.items()}
        loss = self._objective(leaves, {name: view[0] for name, view in fixed.items()}, x[0], y[0])
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        named = zip(leaves, grads, strict=True)
        return {name: g.unsqueeze(0) for name, g in named if g is not None}, loss.detach().unsqueeze(0)

    def _parameters(self, rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        views = self._model.split(self._model.parameters[rows])
        free = {name: view for name, view in views.items() if name in self._trained}
        return free, {name: view for name, view in views.items() if name not in free}


def _runs(sizes: IntArray) -> Iterator[tuple[slice, int]]:
    """Yield the stretches of clients whose batches have one size, and that size."""
    start, listed = 0, sizes.tolist()
    for stop in range(1, len(listed) + 1):
        if stop == len(listed) or listed[stop] != listed[start]:
            yield slice(start, stop), listed[start]
            start = stop
