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
    step = _stepper(work)
    losses: list[Tensor] = []
    for batch in work.batches(server_round):
        losses.append(work.gradient(batch))
        if centre is not None:
            torch.sub(y, centre, out=difference)
            gradient.add_(difference, alpha=rho)
        if linear is not None:
            gradient.sub_(linear)
        step()
    return Descent(len(losses), work.mean_loss(losses))


def _stepper(work: LocalRound) -> Callable[[], object]:
    """Return the optimizer's step on the flat parameters, with fresh state."""
    y, gradient, lr = work.model.parameters, work.model.gradient, work.lr
    if not work.options.own_sgd:
        leaf = y.detach().requires_grad_()  # The same storage, as the leaf that torch.optim asks for.
        leaf.grad = gradient
        return work.options.torch_optimizer([leaf], lr).step
    momentum = work.options.momentum
    if momentum == 0.0:
        return lambda: y.add_(gradient, alpha=-lr)
    velocity = torch.zeros_like(y)
    return lambda: y.add_(velocity.mul_(momentum).add_(gradient), alpha=-lr)
