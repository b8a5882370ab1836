"""Local training of many clients: the loop of `turnout.client.descent` on a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnout.client.work import Descent

if TYPE_CHECKING:
    from turnout.client.batched.cohort_round import CohortRound


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
    step = _stepper(work)
    for batch in work.examples.batches(schedule, total.dtype):
        a = len(batch.sizes)
        y, gradient = model.parameters[:a], model.gradient[:a]
        total[:a] += work.engine.gradient(batch)
        work.add_weight_decay(a)
        if centre is not None:
            gradient.add_(y - _rows(centre, a), alpha=rho)
        if linear is not None:
            gradient.sub_(_rows(linear, a))
        step(a)
    steps = torch.from_numpy(schedule.steps).to(total.device, total.dtype)
    return Descent(steps[:, None], (total / steps).double().cpu().numpy())


def _rows(vector: Tensor, a: int) -> Tensor:
    return vector if vector.dim() == 1 else vector[:a]


def _stepper(work: CohortRound) -> Callable[[int], object]:
    """Return the step of the first ``a`` clients, with fresh state."""
    y, gradient, lr = work.model.parameters, work.model.gradient, work.lr
    if not work.options.own_sgd:
        return _TorchStepper(work)
    momentum = work.options.momentum
    if momentum == 0.0:
        return lambda a: y[:a].add_(gradient[:a], alpha=-lr)
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
        return self._work.options.torch_optimizer([leaf], self._work.lr)
