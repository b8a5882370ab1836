"""BO-REP's client with a shared lower level (arXiv 2401.09587): x stays here, y and z travel."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from turnout.client.flat_model import to_vector
from turnout.client.local_updates.bilevel_work import BilevelWork, cut, flat
from turnout.client.work import Outcome, Work
from turnout.optim.bilevel import descend_lower, hypergradient, joint_norm
from turnout.wire import keys
from turnout.wire.registry import register

_X: Final = "x"
_M: Final = "m"


@register(
    "bo-rep-local-upper",
    kind="local-update",
    paper="2401.09587",
    summary="Keeps x, works on the shared y and z (BO-REP for hyper-cleaning)",
)
def bo_rep_local_upper(work: Work) -> Outcome:
    """Take the step of x that is due, then train y (a refresh), or step m and reply what moves z.

    The length of a step of x depends on the norm of all clients' momenta together, which the server knows
    only after the round: each client steps when it is next asked. A refresh replies the trained y as the
    model; else the reply is ``d2_yy g z - d_y f`` (record "gradient") and, as a metric, the squared norm of
    m.
    """
    problem = BilevelWork.of(work, "lower")
    kept = work.state.load(problem.own_size)
    momentum = [torch.zeros_like(v) for v in problem.own]
    if kept:
        problem.take_own(kept[_X])
        momentum = cut(work.model.tensor(kept[_M]), problem.own)
        _step_upper(work, problem, momentum)
    if work.flag(keys.REFRESH):
        steps = int(work.number(keys.INNER_STEPS))
        lr = work.number(keys.LOWER_LR, positive=True)
        descend_lower(problem.shared, problem.lower_loss, lr=lr, steps=steps)
        _save(work, problem, momentum)
        return Outcome({keys.ARRAYS: work.model.parameters}, float(problem.lower_loss().detach()))
    z = cut(work.needed(keys.IMPLICIT), problem.shared)
    found = hypergradient(problem.own, problem.shared, z, 0.0, problem.upper_loss, problem.lower_loss)
    beta = work.number(keys.BETA)
    weight = float(len(problem.work.data)) if work.flag(keys.BY_EXAMPLES) else 1.0
    for m, h in zip(momentum, found.upper, strict=True):
        m.mul_(beta).add_(h, alpha=(1 - beta) * weight)
    _save(work, problem, momentum)
    square = float(joint_norm(momentum)) ** 2
    return Outcome({keys.GRADIENT: flat(found.implicit)}, float(found.loss), {keys.MOMENTUM_SQUARE: square})


def _step_upper(work: Work, problem: BilevelWork, momentum: list[Tensor]) -> None:
    """Step ``x -= eta m / ||m||`` if the kept m is the one that the server has the norm of."""
    norm = work.number(keys.MOMENTUM_NORM)
    if norm == 0 or work.state.last_round != work.number(keys.MOMENTUM_ROUND):
        return
    eta = work.number(keys.ETA, positive=True)
    with torch.no_grad():
        for x, m in zip(problem.own, momentum, strict=True):
            x.add_(m, alpha=-eta / norm)


def _save(work: Work, problem: BilevelWork, momentum: list[Tensor]) -> None:
    work.state.save({_X: to_vector(flat(problem.own)), _M: to_vector(flat(momentum))})
