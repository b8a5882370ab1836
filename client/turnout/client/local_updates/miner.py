"""FedAMD's miner (arXiv 2206.05891): variance-reduced local steps started at the cached bullseye."""

from __future__ import annotations

import torch

from turnout.client.local_round import LocalRound, Outcome
from turnout.wire import keys
from turnout.wire.registry import register


@register("miner", kind="local-update", paper="2206.05891", summary="Variance-reduced local steps (FedAMD)")
def miner(work: LocalRound) -> Outcome:
    """Run K steps ``y_{k+1} = y_k - lr q_k`` started at ``q_0 = g``, the mean cached gradient.

    ``q_k = q_{k-1} - grad f_i(y_{k-1}; b_k) + grad f_i(y_k; b_k)`` with the same minibatch in both
    gradients (batch norm in evaluation mode). Replies y_K. Needs plain SGD.
    """
    work.require_plain_sgd()
    model, lr = work.model, work.lr
    model.train(False)
    y, q = model.parameters, work.needed(keys.BULLSEYE)
    previous = torch.empty_like(q)
    losses = []
    for k, (x_b, y_b) in enumerate(work.batches()):
        if k == 0:
            # Both gradients are at x: the correction is exactly 0, only the loss is of interest.
            with torch.no_grad():
                losses.append(work.task.loss(model.module(model.inputs(x_b)), y_b))
            continue
        work.gradient(x_b, y_b)
        previous.copy_(model.gradient)
        y.add_(q, alpha=-lr)  # y_{k-1} -> y_k
        losses.append(work.gradient(x_b, y_b))
        q.sub_(previous).add_(model.gradient)
    y.add_(q, alpha=-lr)
    return Outcome({keys.ARRAYS: model.record(model.vector())}, float(torch.stack(losses).mean()))
