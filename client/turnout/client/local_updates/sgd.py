"""Plain local training: FedAvg's client (arXiv 1602.05629), also FedStale's, FedAU's and FedVARP's."""

from __future__ import annotations

from turnout.client.descent import descend
from turnout.client.local_round import LocalRound, Outcome
from turnout.wire import keys
from turnout.wire.registry import register


@register("sgd", kind="local-update", paper="1602.05629", summary="Local training from the global model")
def sgd(work: LocalRound) -> Outcome:
    """Train from the received model x; reply the trained model y."""
    descent = descend(work)
    return Outcome({keys.ARRAYS: work.model.record(work.model.vector())}, descent.train_loss)
