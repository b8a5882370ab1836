"""Local training of many clients: the loop of `turnout.client.descent` on a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnout.client.frozen import Frozen
from turnout.client.optimizer_choice import make
from turnout.client.work import Descent

if TYPE_CHECKING:
    from turnout.client.batched.batches import Batch
    from turnout.client.batched.cohort_round import CohortRound

Step = Callable[["Batch"], Tensor]
"""Takes one step with a batch and returns the losses before it, shape (a,)."""


def descend(
    work: CohortRound,
    *,
    centre: Tensor | None,
    rho: float,
    linear: Tensor | None,
    server_round: int | None,
) -> Descent:
    """Do what `Work.descend` says, for every client of ``work``. Clients that are through drop out."""
    model = work.model
    model.train(True)
    schedule = work.schedule(server_round)
    total = model.parameters.new_zeros(len(model.parameters))
    rule = _sgd if work.options.plain_sgd else _optimizer
    take = rule(work, centre, rho, linear)
    frozen = Frozen(model.frozen, model.parameters)
    for batch in work.examples.batches(schedule, total.dtype):
        a = len(batch.sizes)
        total[:a] += take(batch)
        frozen.put_back(model.parameters[:a])
    steps = torch.from_numpy(schedule.steps).to(total.device, total.dtype)
    return Descent(steps[:, None], (total / steps).double().cpu().numpy())


def _sgd(work: CohortRound, centre: Tensor | None, rho: float, linear: Tensor | None) -> Step:
    """Return the step of plain SGD, with the terms that shrink the parameters as one factor."""
    engine, y, lr = work.engine, work.model.parameters, work.lr
    pull = None if centre is None else rho * centre
    if linear is not None:
        pull = linear if pull is None else pull + linear
    keep = 1.0 - lr * (work.options.weight_decay + (0.0 if centre is None else rho))

    def take(batch: Batch) -> Tensor:
        losses = engine.sgd_step(batch, lr, keep)
        if pull is not None:
            y[: len(losses)].add_(_rows(pull, len(losses)), alpha=lr)
        return losses

    return take


def _optimizer(work: CohortRound, centre: Tensor | None, rho: float, linear: Tensor | None) -> Step:
    """Return the step of any other optimizer on the gradients."""
    model, step = work.model, _stepper(work)

    def take(batch: Batch) -> Tensor:
        losses = work.gradient(batch)
        a = len(losses)
        gradient = model.gradient[:a]
        if centre is not None:
            gradient.add_(model.parameters[:a] - _rows(centre, a), alpha=rho)
        if linear is not None:
            gradient.sub_(_rows(linear, a))
        step(a)
        return losses

    return take


def _rows(vector: Tensor, a: int) -> Tensor:
    return vector if vector.dim() == 1 else vector[:a]


def _stepper(work: CohortRound) -> Callable[[int], object]:
    """Return the step of the first ``a`` clients, with fresh state."""
    y, gradient, lr = work.model.parameters, work.model.gradient, work.lr
    if not work.options.own_sgd:
        return _TorchStepper(work)
    momentum = work.options.momentum
    velocity = work.model.workspace("velocity", len(y)).zero_()
    return lambda a: y[:a].add_(velocity[:a].mul_(momentum).add_(gradient[:a]), alpha=-lr)


class _TorchStepper:
    """A ``torch.optim`` optimizer over the stack, whose state shrinks when clients drop out."""

    def __init__(self, work: CohortRound) -> None:
        self._work = work
        self._count = len(work.model.parameters)
        self._optimizer = self._over(self._count)

    def __call__(self, a: int) -> None:
        if a < self._count:
            (state,) = self._optimizer.state.values()
            full = (self._count, self._work.model.size)
            self._optimizer, self._count = self._over(a), a
            (leaf,) = self._optimizer.param_groups[0]["params"]
            self._optimizer.state[leaf] = {
                key: value[:a] if isinstance(value, Tensor) and value.shape == full else value
                for key, value in state.items()
            }
        self._optimizer.step()

    def _over(self, a: int) -> torch.optim.Optimizer:
        """Return an optimizer of the first ``a`` clients."""
        model = self._work.model
        leaf = model.parameters[:a].detach().requires_grad_()
        leaf.grad = model.gradient[:a]
        return make(self._work.options, model.module, leaf, self._work.lr, seed=0)
