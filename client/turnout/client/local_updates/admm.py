"""RERCE-Fed's client (arXiv 2409.13451): ADMM with the dual eliminated; clients keep their models w_k.

Three forms, by the flags of the request:

* scheduled (default): receives ``s = 2 w_n - w_{n-1}``, steps once, replies w_k;
* ``extrapolate``: receives w_n and forms s itself from the model it received before (two noisy copies);
* ``continual``: receives w_n, the mean of the server's slots, and replies ``s_k = 2 w_new - w_old``. The
  client is deemed to have stepped in every round, with the last model it received; the missed rounds are made
  up when it is next heard of, which is the same sequence.

On first contact the client solves its local problem against w_0. In round 1 that is the reply; later it is
followed by the round's update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from turnout.client.local_updates.proximal import ProximalSteps, initial_model, proximal_steps
from turnout.client.work import Outcome, Work
from turnout.tasks.task import Vector
from turnout.wire import keys
from turnout.wire.registry import register

_PRIMAL: Final = "primal"
_REFERENCE: Final = "reference"
_RECEIVED: Final = "received"


@dataclass(frozen=True, slots=True)
class AdmmState:
    """What a client keeps: w_k, its reference gradient (None in closed form), and from when.

    ``received`` is the model it received last, ``last_round`` the round of its last step.
    """

    primal: Vector
    reference: Vector | None
    received: Vector
    last_round: int

    def stepped(self, steps: ProximalSteps, s: Vector, server_round: int) -> AdmmState:
        """Return the state after the step of ``server_round`` towards ``s``."""
        primal, reference = steps.step(self.primal, self.reference, s, server_round)
        return replace(self, primal=primal, reference=reference, last_round=server_round)


def load_admm(work: Work, steps: ProximalSteps) -> AdmmState:
    """Return the client's state, which on first contact is that of the start, round 1."""
    kept = work.state.load(work.model.size)
    if kept:
        return AdmmState(
            kept[_PRIMAL],
            kept.get(_REFERENCE),
            kept.get(_RECEIVED, kept[_PRIMAL]),
            work.state.last_round or 1,
        )
    w_0 = initial_model(work)
    return AdmmState(*steps.start(w_0, 1), received=w_0, last_round=1)


def caught_up(state: AdmmState, steps: ProximalSteps, server_round: int) -> AdmmState:
    """Return the state after the missed steps up to ``server_round``, each with the last received model."""
    for missed in range(state.last_round + 1, server_round + 1):
        state = state.stepped(steps, state.received, missed)
    return state


@register(
    "admm",
    kind="local-update",
    paper="2409.13451",
    summary="Dual-free ADMM step on a kept local model (RERCE-Fed)",
)
def admm(work: Work) -> Outcome:
    """Step w_k and reply it, or its extrapolation when ``continual``; see the module."""
    received = work.model.vector()
    steps = proximal_steps(work, work.number(keys.RHO, positive=True))
    continual, now = work.flag(keys.CONTINUAL), work.server_round
    state = load_admm(work, steps)
    old = state.received
    if now > 1:
        if continual:
            state = caught_up(state, steps, now - 1)
        old, s = state.primal, received
        if work.flag(keys.EXTRAPOLATE):
            s = 2.0 * received - state.received
        state = replace(state.stepped(steps, s, now), received=received)
    _save(work, state, keep_received=continual or work.flag(keys.EXTRAPOLATE))
    sent = 2.0 * state.primal - old if continual else state.primal
    return Outcome({keys.ARRAYS: sent}, steps.train_loss(state.primal))


def local_model(work: Work) -> Vector:
    """Return w_k as it stands after round ``work.server_round``, without stepping or saving anything.

    A client that was never asked has its start, the local solve against w_0.
    """
    steps = proximal_steps(work, work.number(keys.RHO, positive=True))
    state = load_admm(work, steps)
    if work.flag(keys.CONTINUAL):
        state = caught_up(state, steps, work.server_round)
    return state.primal


def _save(work: Work, state: AdmmState, *, keep_received: bool) -> None:
    vectors = {_PRIMAL: state.primal}
    if state.reference is not None:
        vectors[_REFERENCE] = state.reference
    if keep_received:
        vectors[_RECEIVED] = state.received
    work.state.save(vectors)
