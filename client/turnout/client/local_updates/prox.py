"""FedProx's client (arXiv 1812.06127): local training with a proximal term."""

from __future__ import annotations

from turnout.client.descent import proximal_descent
from turnout.client.local_round import LocalRound, Outcome
from turnout.wire import keys
from turnout.wire.registry import register


@register(
    "prox", kind="local-update", paper="1812.06127", summary="Local training with a proximal term (FedProx)"
)
def prox(work: LocalRound) -> Outcome:
    """Descend on ``f_i(w) + mu/2 ||w - x||^2`` from the received model x; reply the result."""
    x = work.model.parameters.clone()
    descent = proximal_descent(work, centre=x, rho=work.number(keys.PROXIMAL_MU))
    return Outcome({keys.ARRAYS: work.model.record(work.model.vector())}, descent.train_loss)
