"""BO-REP's client with a shared upper level (arXiv 2401.09587): the head y and the vector z stay here."""

from __future__ import annotations

from typing import Final

import torch

from turnout.client.flat_model import to_vector
from turnout.client.local_updates.bilevel_work import BilevelWork, cut, flat
from turnout.client.work import Outcome, Work
from turnout.optim.bilevel import descend_lower, hypergradient, refine_lower
from turnout.wire import keys
from turnout.wire.registry import register

_Y: Final = "y"
_Z: Final = "z"


@register(
    "bo-rep",
    kind="local-update",
    paper="2401.09587",
    summary="Hypergradient of x over the client's own y (BO-REP)",
)
def bo_rep(work: Work) -> Outcome:
    """Bring y up to date, step z, and reply h (record "gradient"), averaged over the local steps.

    y is refined at first and after more than an interval of absence, refreshed when the server says so, and
    left alone otherwise. x is not stepped here: a sum of normalised steps is not a normalised sum.
    """
    problem = BilevelWork.of(work, "upper")
    last = work.state.last_round
    kept = work.state.load(problem.own_size)
    z = [torch.zeros_like(v) for v in problem.own]
    if kept:
        problem.take_own(kept[_Y])
        z = cut(work.model.tensor(kept[_Z]), problem.own)
    lr = work.number(keys.LOWER_LR, positive=True)
    interval = int(work.number(keys.INTERVAL, positive=True))
    if last is None or work.server_round - last > interval:
        refine_lower(problem.own, problem.lower_loss, lr=lr, steps=int(work.number(keys.INIT_STEPS)))
    elif work.flag(keys.REFRESH):
        descend_lower(problem.own, problem.lower_loss, lr=lr, steps=int(work.number(keys.INNER_STEPS)))
    nu, steps = work.number(keys.NU), work.options.local_steps or 1
    mean = torch.zeros_like(work.model.parameters)
    losses = []
    for _ in range(steps):
        found = hypergradient(problem.shared, problem.own, z, nu, problem.upper_loss, problem.lower_loss)
        mean.add_(flat(found.upper), alpha=1 / steps)
        losses.append(found.loss)
    work.state.save({_Y: to_vector(flat(problem.own)), _Z: to_vector(flat(z))})
    return Outcome({keys.GRADIENT: mean}, work.mean_loss(losses))
