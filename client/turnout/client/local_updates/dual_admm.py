"""Consensus ADMM's client with an explicit dual: the baseline of RERCE-Fed (arXiv 2409.13451)."""

from __future__ import annotations

from typing import Final

import numpy as np

from turnout.client.local_updates.proximal import ProximalSteps, initial_model, proximal_steps
from turnout.client.work import Outcome, Work
from turnout.tasks.task import Vector
from turnout.wire import keys
from turnout.wire.registry import register

_PRIMAL: Final = "primal"
_DUAL: Final = "dual"


@register(
    "dual-admm", kind="local-update", paper="2409.13451", summary="ADMM step with an explicit dual (baseline)"
)
def dual_admm(work: Work) -> Outcome:
    """Update ``z_k += rho (w_k - w_n)``, then ``w_k = argmin f_k(w) + <z_k, w> + rho/2 ||w - w_n||^2``.

    Replies ``w_k + z_k / rho``. On first contact z_k = 0 and w_k is the local solve against w_0; in round 1
    that is the reply, later the round's update follows.
    """
    rho = work.number(keys.RHO, positive=True)
    steps = proximal_steps(work, rho)
    received = work.model.vector()
    w, z = _load(work, steps)
    if work.server_round > 1:
        z = z + rho * (w - received)
        w = steps.dual_step(w, z, received, work.server_round)
    work.state.save({_PRIMAL: w, _DUAL: z})
    return Outcome({keys.ARRAYS: w + z / rho}, steps.train_loss(w))


def local_model(work: Work) -> Vector:
    """Return w_k as it stands (its first solve if never asked), without stepping or saving anything."""
    return _load(work, proximal_steps(work, work.number(keys.RHO, positive=True)))[0]


def _load(work: Work, steps: ProximalSteps) -> tuple[Vector, Vector]:
    """Return (w_k, z_k), which on first contact are the local solve against w_0 and zero."""
    kept = work.state.load(work.model.size)
    if kept:
        return kept[_PRIMAL], kept[_DUAL]
    w, _ = steps.start(initial_model(work), 1)
    return w, np.zeros_like(w)
