"""FedAMD's miner (arXiv 2206.05891): variance-reduced local steps started at the cached bullseye."""

from __future__ import annotations

import torch

from turnout.client.work import Outcome, Work
from turnout.wire import keys
from turnout.wire.registry import register


@register("miner", kind="local-update", paper="2206.05891", summary="Variance-reduced local steps (FedAMD)")
def miner(work: Work) -> Outcome:
    """Run K steps ``y_{k+1} = y_k - lr q_k`` started at ``q_0 = g``, the mean cached gradient.

    ``q_k = q_{k-1} - grad f_i(y_{k-1}; b_k) + grad f_i(y_k; b_k)`` with the same minibatch in both
    gradients (batch norm in evaluation mode). Replies y_K. Needs plain SGD.
    """
    work.require_plain_sgd()
    model, lr = work.model, work.lr
    model.train(False)
    bullseye = work.needed(keys.BULLSEYE)
    q = torch.empty_like(model.parameters).copy_(bullseye)
    previous = torch.empty_like(q)
    losses = []
    parts = work.start_parts()
    for k, batch in enumerate(work.batches()):
        if k == 0:
            # Both gradients are at x: the correction is exactly 0, only the loss is of interest.
            losses.append(work.loss(batch))
            continue
        parts.before_step(lambda batch=batch: work.probe(batch))  # type: ignore[misc]
        y_k, q_k, gradient = work.stepping(model.parameters), work.stepping(q), work.stepping(model.gradient)
        work.gradient(batch)
        before = work.stepping(previous).copy_(gradient)
        y_k.add_(q_k, alpha=-lr)  # y_{k-1} -> y_k
        losses.append(work.gradient(batch))
        parts.after_gradient()
        q_k.sub_(before).add_(gradient)
        parts.leave_step()
    parts.before_step(lambda: losses[-1])
    model.parameters.add_(q, alpha=-lr)
    parts.leave_step()
    parts.end()
    return Outcome({keys.ARRAYS: model.parameters}, work.mean_loss(losses))
