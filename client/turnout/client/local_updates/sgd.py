"""Plain local training: FedAvg's client (arXiv 1602.05629), also FedStale's, FedAU's and FedVARP's."""

from __future__ import annotations

from turnout.client.work import Outcome, Work
from turnout.wire import keys
from turnout.wire.registry import register


@register("sgd", kind="local-update", paper="1602.05629", summary="Local training from the global model")
def sgd(work: Work) -> Outcome:
    """Train from the received model x; reply the trained model y."""
    descent = work.descend()
    return Outcome({keys.ARRAYS: work.model.parameters}, descent.train_loss)
