"""Local training as descent on the flat vector: the loop that the local updates share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.client.local_round import LocalRound


@dataclass(frozen=True, slots=True)
class Descent:
    """How a local training went: number of steps and mean loss over the minibatches, each before its step."""

    steps: int
    train_loss: float


def descend(
    work: LocalRound,
    correct: Callable[[Tensor], object] | None = None,
    server_round: int | None = None,
) -> Descent:
    """Train ``work.model`` in place for the configured number of steps or epochs.

    ``correct`` may change the gradient (shape (P,), in place) before each step. Minibatches are ordered as in
    ``server_round`` (None: the request's).
    """
    model = work.model
    model.train(True)
    step = _stepper(work)
    losses: list[Tensor] = []
    for x, y in work.batches(server_round):
        losses.append(work.gradient(x, y))
        if correct is not None:
            correct(model.gradient)
        step()
    return Descent(len(losses), float(torch.stack(losses).mean()))


def proximal_descent(
    work: LocalRound,
    *,
    centre: Tensor,
    rho: float,
    linear: Tensor | None = None,
    server_round: int | None = None,
) -> Descent:
    """Descend from the model's present parameters on ``f(y) - <linear, y> + rho/2 ||y - centre||^2``."""
    y, difference = work.model.parameters, torch.empty_like(work.model.parameters)

    def correct(gradient: Tensor) -> None:
        torch.sub(y, centre, out=difference)
        gradient.add_(difference, alpha=rho)
        if linear is not None:
            gradient.sub_(linear)

    return descend(work, correct, server_round)


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
