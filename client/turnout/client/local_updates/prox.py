"""FedProx's client (arXiv 1812.06127): local training with a proximal term."""

from __future__ import annotations

from turnout.client.work import Outcome, Work
from turnout.wire import keys
from turnout.wire.registry import register


@register(
    "prox", kind="local-update", paper="1812.06127", summary="Local training with a proximal term (FedProx)"
)
def prox(work: Work) -> Outcome:
    """Descend on ``f_i(w) + mu/2 ||w - x||^2`` from the received model x; reply the result."""
    x = work.received()
    descent = work.descend(centre=x, rho=work.number(keys.PROXIMAL_MU))
    return Outcome({keys.ARRAYS: work.model.parameters}, descent.train_loss)
