"""Local training of one client as descent on the flat vector: the loop that the local updates share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnout.client.work import Descent

if TYPE_CHECKING:
    from turnout.client.local_round import LocalRound


def descend(
    work: LocalRound,
    *,
    centre: Tensor | None = None,
    rho: float = 0.0,
    linear: Tensor | None = None,
    server_round: int | None = None,
) -> Descent:
    """Do what `Work.descend` says, for one client."""
    model = work.model
    model.train(True)
    y, gradient = model.parameters, model.gradient
    difference = torch.empty_like(y if centre is not None else y[:0])
    optimizer = None if work.options.own_sgd else work.begin_optimizer()
    step = _sgd(work) if optimizer is None else optimizer.step
    losses: list[Tensor] = []
    parts = work.start_parts(server_round)
    for batch in work.batches(server_round):
        parts.before_step(lambda batch=batch: work.probe(batch))  # type: ignore[misc]
        losses.append(work.gradient(batch))
        parts.after_gradient()
        if centre is not None:
            torch.sub(y, centre, out=difference)
            gradient.add_(difference, alpha=rho)
        if linear is not None:
            gradient.sub_(linear)
        parts.enter_step()
        step()
        parts.leave_step()
    parts.end()
    if optimizer is not None:
        work.end_optimizer(optimizer)
    return Descent(len(losses), work.mean_loss(losses))


def _sgd(work: LocalRound) -> Callable[[], object]:
    """Return the step of SGD on the flat parameters, with fresh momentum."""
    y, gradient, lr = work.model.parameters, work.model.gradient, work.lr
    momentum = work.options.momentum
    if momentum == 0.0:
        return lambda: y.add_(gradient, alpha=-lr)
    velocity = torch.zeros_like(y)
    return lambda: y.add_(velocity.mul_(momentum).add_(gradient), alpha=-lr)
