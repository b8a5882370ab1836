"""Local training of one client as descent on the flat vector: the loop that the local updates share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnout.client.frozen import Frozen
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
    parts = work.start_parts(server_round)
    o = work.options
    if centre is None and linear is None and o.plain_sgd and not o.weight_decay and not parts:
        losses = _plain(work, server_round)
        return Descent(len(losses), work.mean_loss(losses))
    y, gradient = model.parameters, model.gradient
    frozen = Frozen(model.frozen, y)
    difference = torch.empty_like(y if centre is not None else y[:0])
    optimizer = None if o.own_sgd else work.begin_optimizer()
    step = _sgd(work) if optimizer is None else optimizer.step
    losses = []
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
        frozen.put_back(y)
        parts.leave_step()
    parts.end()
    if optimizer is not None:
        work.end_optimizer(optimizer)
    return Descent(len(losses), work.mean_loss(losses))


def _plain(work: LocalRound, server_round: int | None) -> list[Tensor]:
    """Take steps of plain SGD on the loss alone and return the losses.

    Autograd's gradients go to the step as they are: to be gathered in ``model.gradient`` they would pass
    through the cache twice more, which is a tenth of a small model's step.
    """
    output, loss_of, lr = work.output, work.task.loss, work.lr
    losses: list[Tensor] = []
    with work.model.own_gradients() as trained:
        values = [tensor.detach() for tensor in trained]
        for x, y in work.batches(server_round):
            loss = loss_of(output(x), y)
            torch.autograd.backward(loss)
            losses.append(loss.detach())
            for value, tensor in zip(values, trained, strict=True):
                if tensor.grad is not None:  # Else the batch did not go through it.
                    value.add_(tensor.grad, alpha=-lr)
                    tensor.grad = None
    return losses


def _sgd(work: LocalRound) -> Callable[[], object]:
    """Return the step of SGD on the flat parameters, with fresh momentum."""
    y, gradient, lr = work.model.parameters, work.model.gradient, work.lr
    momentum = work.options.momentum
    if momentum == 0.0:
        return lambda: y.add_(gradient, alpha=-lr)
    velocity = torch.zeros_like(y)
    return lambda: y.add_(velocity.mul_(momentum).add_(gradient), alpha=-lr)
