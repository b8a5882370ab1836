"""Gradients of sequences of well-known layers under a well-known loss, without autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from turnout.client.batched.batches import Batch
from turnout.client.batched.heads import HEADS
from turnout.client.batched.layers.convolution import Convolution
from turnout.client.batched.layers.layer import Layer, Target
from turnout.client.batched.stacked_model import StackedModel
from turnout.client.batched.workspace import Workspace
from turnout.tasks.losses import LossName


class LayeredEngine:
    """Forward and backward passes on views of the stacked parameters; SGD needs no gradient buffer."""

    def __init__(self, loss: LossName, layers: list[Layer], model: StackedModel, space: Workspace) -> None:
        self._head = HEADS[loss]
        self._layers = layers
        self.numbers = sum(layer.numbers for layer in layers)
        self.alone = any(isinstance(layer, Convolution) for layer in layers)
        self._first = next(i for i, layer in enumerate(layers) if layer.trains)
        self._model = model
        self._space = space

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of each client of ``batch``, shape (a,)."""
        parameters = self._model.views("parameters", len(batch.sizes))
        return self._head(self._forward(batch, parameters), batch, self._space)[0]

    @torch.no_grad()
    def gradient(self, batch: Batch, *, accumulate: bool = False) -> Tensor:
        """Put (or add) the gradients into the model's; return the losses, shape (a,)."""
        target = self._model.views("gradient", len(batch.sizes))
        return self._pass(batch, Target(target, _mean(batch), 1.0 if accumulate else 0.0))

    @torch.no_grad()
    def sgd_step(self, batch: Batch, lr: float, keep: float) -> Tensor:
        """Set the parameters y to ``keep * y - lr * gradient``; return the losses before, shape (a,)."""
        target = self._model.views("parameters", len(batch.sizes))
        return self._pass(batch, Target(target, -lr * _mean(batch), keep))

    def _pass(self, batch: Batch, target: Target) -> Tensor:
        parameters = self._model.views("parameters", len(batch.sizes))
        losses, d = self._head(self._forward(batch, parameters), batch, self._space)
        for i in range(len(self._layers) - 1, self._first - 1, -1):
            d = self._layers[i].backward(d, parameters, target, first=i == self._first)
        return losses

    def _forward(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        x = batch.x
        for layer in self._layers:
            x = layer.forward(x, parameters)
        return x


def _mean(batch: Batch) -> float:
    return 1.0 / batch.x.shape[1] if batch.weights is None else 1.0
