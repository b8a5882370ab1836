"""FedAMD's anchor (arXiv 2206.05891): one large-batch gradient at the global model."""

from __future__ import annotations

import torch

from turnout.client.flat_model import to_vector
from turnout.client.local_round import LocalRound, Outcome
from turnout.wire import keys
from turnout.wire.registry import register


@register(
    "anchor",
    kind="local-update",
    paper="2206.05891",
    summary="Large-batch gradient at the global model (FedAMD)",
)
def anchor(work: LocalRound) -> Outcome:
    """Reply, as record "gradient", the mean gradient at x over the local set.

    With ``anchor_batch_size`` it is over that many random examples. Batch norm uses its stored statistics,
    as in the miner, so that the two differentiate the same function.
    """
    model, size = work.model, work.options.anchor_batch_size
    model.train(False)
    rows = None
    if size is not None and size < len(work.data):
        chosen = work.generator().choice(len(work.data), size, replace=False)
        rows = torch.from_numpy(chosen).to(model.parameters.device)
    loss = work.large_batch_gradient(rows)
    return Outcome({keys.GRADIENT: model.layout.record(to_vector(model.gradient))}, float(loss))
