"""The known losses: per-client values, and gradients of the last layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from turnout.client.batched.batches import Batch
from turnout.client.batched.workspace import Workspace
from turnout.tasks.losses import LossName

Head = Callable[[Tensor, Batch, Workspace], tuple[Tensor, Tensor]]
"""Takes outputs (a, K, w), a batch and scratch space; returns losses (a,) and the outputs' gradient.

The gradient may take the outputs' place. It is of the sum over examples where the batch has no weights, of
the weighted sum where it has.
"""


def cross_entropy(z: Tensor, batch: Batch, space: Workspace) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy with integer labels, and ``softmax(z) - onehot``."""
    a, _, w = z.shape
    labels = batch.y.unsqueeze(1)
    logs = torch.log_softmax(z, 1, out=space.get("logs", *z.shape))
    likelihood = torch.gather(logs, 1, labels, out=space.get("likelihood", a, 1, w))
    losses = _summed(likelihood.squeeze(1), batch).neg_()
    d = torch.exp(logs, out=z)
    d.scatter_add_(1, labels, space.get("minus one", 1, 1, 1).fill_(-1.0).expand(a, 1, w))
    return losses, _weighted(d, batch)


def mean_squared_error(z: Tensor, batch: Batch, space: Workspace) -> tuple[Tensor, Tensor]:
    """Return the mean over examples and outputs of the squared error, and its gradient."""
    difference = z.sub_(batch.y.mT)
    squares = torch.square(difference, out=space.get("squares", *z.shape)).mean(dim=1)
    return _summed(squares, batch), _weighted(difference.mul_(2.0 / z.shape[1]), batch)


def _summed(values: Tensor, batch: Batch) -> Tensor:
    """Return the weighted sum of per-example ``values`` (a, w)."""
    if batch.weights is None:
        return values.mean(dim=1)
    return (values * batch.weights).sum(dim=1)


def _weighted(d: Tensor, batch: Batch) -> Tensor:
    return d if batch.weights is None else d.mul_(batch.weights.unsqueeze(1))


HEADS: Final[dict[LossName, Head]] = {
    "cross-entropy": cross_entropy,
    "mean-squared-error": mean_squared_error,
}
