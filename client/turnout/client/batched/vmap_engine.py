"""Gradients of any module: many clients at once by ``torch.func``, few of them one by one by autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from turnout.client.batched.batches import Batch
from turnout.client.batched.schedule import IntArray
from turnout.client.batched.stacked_model import StackedModel
from turnout.tasks.task import Task

_LAYERS: Final = 8  # A guess at the size of the activations, in inputs.
_FEW: Final = 16  # Below this many clients `vmap` costs a CPU more than it saves.


class VmapEngine:
    """Loss and gradient of the task's own module and loss.

    What a loss does with padding cannot be known: clients whose batches differ in size go in calls of their
    own.
    """

    def __init__(self, task: Task, model: StackedModel, x_shape: tuple[int, ...]) -> None:
        def objective(free: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return task.loss(functional_call(model.module, free | fixed, (x,)), y)

        self._task, self._model = task, model
        self._trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
        self._gradient: Any = vmap(grad_and_value(objective))
        self.numbers = _LAYERS * math.prod(x_shape)
        on_cpu = model.template.parameters.device.type == "cpu"
        # On a CPU, a convolution with a filter per client is slower than one after the other.
        self.alone = on_cpu and any(isinstance(m, nn.modules.conv._ConvNd) for m in model.module.modules())
        self._few = (_FEW if on_cpu else 2) if not self.alone else math.inf

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of each client of ``batch``, shape (a,)."""
        losses = []
        with torch.no_grad():
            for i, size in enumerate(batch.sizes.tolist()):
                module = self._load(i)
                losses.append(self._task.loss(module(batch.x[i, :size]), batch.y[i, :size]))
        return torch.stack(losses)

    def gradient(self, batch: Batch, *, accumulate: bool = False) -> Tensor:
        """Put (or add) the gradients into the model's, rows of the batch's clients; return their losses."""
        losses = self._model.parameters.new_empty(len(batch.sizes))
        shares = None
        if batch.shares is not None:
            shares = torch.from_numpy(batch.shares).to(losses.device, losses.dtype)
        for rows, size in _runs(batch.sizes):
            if rows.stop - rows.start >= self._few:
                self._together(rows, batch.x[rows, :size], batch.y[rows, :size], losses, shares, accumulate)
                continue
            for i in range(rows.start, rows.stop):
                losses[i] = self._alone(i, batch.x[i, :size], batch.y[i, :size])
                gradient, place = self._model.template.gradient, self._model.gradient[i]
                if shares is not None:
                    gradient = gradient * shares[i]
                place.add_(gradient) if accumulate else place.copy_(gradient)
        return losses if shares is None else losses.mul_(shares)

    def sgd_step(self, batch: Batch, lr: float, keep: float) -> Tensor:
        """Set the parameters y to ``keep * y - lr * gradient``; return the losses before, shape (a,)."""
        losses = self._model.parameters.new_empty(len(batch.sizes))
        for rows, size in _runs(batch.sizes):
            x, y = batch.x[rows, :size], batch.y[rows, :size]
            if len(x) >= self._few:
                self._together(rows, x, y, losses, None, accumulate=False)
                self._step(rows, self._model.gradient[rows], lr, keep)
                continue
            for i in range(len(x)):
                losses[rows.start + i] = self._alone(rows.start + i, x[i], y[i])
                self._step(rows.start + i, self._model.template.gradient, lr, keep)
        return losses

    def _step(self, rows: slice | int, gradient: Tensor, lr: float, keep: float) -> None:
        parameters = self._model.parameters[rows]
        if keep != 1.0:
            parameters.mul_(keep)
        parameters.add_(gradient, alpha=-lr)

    def _alone(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        """Put the gradient of the client in row ``i`` into the template's; return its loss."""
        template = self._model.template
        module = self._load(i)
        template.gradient.zero_()
        loss = self._task.loss(module(x), y)
        torch.autograd.backward(loss)
        return loss.detach()

    def _together(
        self, rows: slice, x: Tensor, y: Tensor, losses: Tensor, shares: Tensor | None, accumulate: bool
    ) -> None:
        """Differentiate for the clients in ``rows``, which have batches of one size."""
        views = self._model.split(self._model.parameters[rows])
        free = {name: view for name, view in views.items() if name in self._trained}
        fixed = {name: view for name, view in views.items() if name not in free}
        gradients, losses[rows] = self._gradient(free, fixed, x, y)
        for name, place in self._model.split(self._model.gradient[rows]).items():
            if name not in gradients:
                if not accumulate:
                    place.zero_()
                continue
            gradient = gradients[name]
            if shares is not None:
                gradient = gradient * shares[rows].view(-1, *[1] * (place.dim() - 1))
            place.add_(gradient) if accumulate else place.copy_(gradient)

    def _load(self, i: int) -> nn.Module:
        """Return the template's module with the parameters of row ``i``."""
        self._model.template.parameters.copy_(self._model.parameters[i])
        return self._model.module


def _runs(sizes: IntArray) -> Iterator[tuple[slice, int]]:
    """Yield the stretches of clients whose batches have one size, and that size."""
    start, listed = 0, sizes.tolist()
    for stop in range(1, len(listed) + 1):
        if stop == len(listed) or listed[stop] != listed[start]:
            yield slice(start, stop), listed[start]
            start = stop
