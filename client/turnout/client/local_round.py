"""One client's work in one round: what a local update is given, and the steps that local updates share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from turnout.client.descent import descend
from turnout.client.flat_model import FlatModel
from turnout.client.minibatches import generator, minibatches
from turnout.client.options import TrainOptions
from turnout.client.round_optimizer import RoundOptimizer
from turnout.client.state import ClientState
from turnout.client.training_parts import TrainingParts
from turnout.client.work import Descent, Work
from turnout.tasks.task import AdmmSolver, ClientData, Task, Vector


@dataclass(slots=True)
class LocalRound(Work):
    """The work of one client.

    ``content`` is the request's and shared with other clients: read only.
    """

    client: int
    server_round: int
    local_update: str
    model: FlatModel
    task: Task
    data: ClientData
    options: TrainOptions
    lr: float
    config: ConfigRecord
    content: RecordDict
    state: ClientState
    optimizer: RoundOptimizer

    @property
    def who(self) -> str:
        """The client, for messages."""
        return f"client {self.client}"

    def generator(self, server_round: int | None = None) -> np.random.Generator:
        """Return a new generator of this client's randomness in ``server_round`` (None: the request's)."""
        return generator(
            self.options.seed, self.client, self.server_round if server_round is None else server_round
        )

    def extra(self, key: str) -> Vector | None:
        """Return the request's record ``key`` as a vector, shape (P,), or None when there is none."""
        record = self.content.get(key)
        if not isinstance(record, ArrayRecord):
            return None
        return self.model.layout.flatten(record, with_buffers=False)

    def received(self) -> Tensor:
        """Return a copy of the received model, shape (P,)."""
        return self.model.parameters.clone()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss on a batch."""
        x, y = batch
        with torch.no_grad():
            return self.task.loss(self.output(x), y)

    def probe(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss on a batch in evaluation mode: nothing is drawn, no statistics change."""
        training = self.model.module.training
        self.model.train(False)
        loss = self.loss(batch)
        self.model.train(training)
        return loss

    def gradient(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Put the gradient of the mean loss on a batch into ``model.gradient``; return that loss."""
        model, (x, y) = self.model, batch
        model.gradient.zero_()
        loss = self.task.loss(self.output(x), y)
        torch.autograd.backward(model.parts.penalty(loss))
        if self.options.weight_decay:
            self._add_weight_decay()
        return loss.detach()

    def large_batch_gradient(self, size: int | None = None) -> float:
        """Put the mean gradient over ``size`` random examples (None: all) into ``model.gradient``.

        Returns the loss. Works through the examples in chunks, so that memory does not grow with the client's
        data.
        """
        x, y = self.data.x, self.data.y
        if size is not None and size < len(y):
            rows = torch.from_numpy(self.generator().choice(len(y), size, replace=False)).to(y.device)
            x, y = x.index_select(0, rows), y.index_select(0, rows)
        chunk = self.task.chunk_size
        if len(y) <= chunk:
            return float(self.gradient((x, y)))
        model = self.model
        model.gradient.zero_()
        total = torch.zeros((), dtype=model.parameters.dtype, device=model.parameters.device)
        for start in range(0, len(y), chunk):
            piece = slice(start, start + chunk)
            loss = self.task.loss(self.output(x[piece]), y[piece]) * (len(y[piece]) / len(y))
            torch.autograd.backward(loss if start else model.parts.penalty(loss))
            total += loss.detach()
        if self.options.weight_decay:
            self._add_weight_decay()
        return float(total)

    def batches(self, server_round: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield minibatches of one local training, ordered as in ``server_round`` (None: the request's)."""
        o = self.options
        return minibatches(
            self.data,
            lambda: self.generator(server_round),
            batch_size=o.batch_size,
            steps=o.local_steps,
            epochs=o.local_epochs or 1,
        )

    def stepping(self, vector: Tensor) -> Tensor:
        """Return ``vector``: its client has every batch."""
        return vector

    def mean_loss(self, losses: list[Tensor]) -> float:
        """Return the mean of the losses of successive batches."""
        return float(torch.stack(losses).mean())

    def descend(
        self,
        *,
        centre: Tensor | None = None,
        rho: float = 0.0,
        linear: Tensor | None = None,
        server_round: int | None = None,
    ) -> Descent:
        """Train the model in place, see `Work.descend`."""
        return descend(self, centre=centre, rho=rho, linear=linear, server_round=server_round)

    def begin_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer for one local training."""
        return self.optimizer.begin(self.model, self.lr, self.extra)

    def end_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's state after a local training."""
        self.optimizer.end(optimizer, self.model)

    def start_parts(self, server_round: int | None = None) -> TrainingParts:
        """Open a local training for the parts of the model that have a say in it, and return them."""
        now = self.server_round if server_round is None else server_round
        self.model.parts.start(now, (self.options.seed, self.client, now))
        return self.model.parts

    def admm_solver(self, rho: float) -> AdmmSolver | None:
        """Return the task's exact proximal steps for this client, or None when there are none."""
        return self.task.admm_solver(self.client, rho)

    def whole_loss(self, vector: Vector) -> float:
        """Return the loss of the model ``vector`` on all of the client's examples."""
        self.model.load_vector(vector)
        return float(self.loss((self.data.x, self.data.y)))

    def output(self, x: Tensor) -> Tensor:
        """Return the model's output for ``x``, in the precision of the options."""
        module, x = self.model.module, self.model.inputs(x)
        if self.options.precision == "float32":
            output: Tensor = module(x)
            return output
        with torch.autocast(x.device.type, torch.bfloat16):
            output = module(x)
        return output.float() if output.dtype == torch.bfloat16 else output

    def _add_weight_decay(self) -> None:
        if self.options.own_sgd:  # Other optimizers decay the weights themselves.
            model = self.model
            model.gradient.add_(model.parameters, alpha=self.options.weight_decay)
            for piece in model.frozen:
                model.gradient[piece] = 0.0
