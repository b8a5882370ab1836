"""FedAMD's anchor (arXiv 2206.05891): one large-batch gradient at the global model."""

from __future__ import annotations

from turnout.client.work import Outcome, Work
from turnout.wire import keys
from turnout.wire.registry import register


@register(
    "anchor",
    kind="local-update",
    paper="2206.05891",
    summary="Large-batch gradient at the global model (FedAMD)",
)
def anchor(work: Work) -> Outcome:
    """Reply, as record "gradient", the mean gradient at x over the local set.

    With ``anchor_batch_size`` it is over that many random examples. Batch norm uses its stored statistics,
    as in the miner, so that the two differentiate the same function.
    """
    work.model.train(False)
    loss = work.large_batch_gradient(work.options.anchor_batch_size)
    return Outcome({keys.GRADIENT: work.model.gradient}, loss)
