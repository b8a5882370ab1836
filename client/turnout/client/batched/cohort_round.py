"""The work of many clients in one round, on a stack of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from turnout.client.batched.batches import Batch, Examples
from turnout.client.batched.cohort import CohortWork
from turnout.client.batched.cohort_state import CohortState
from turnout.client.batched.descent import descend
from turnout.client.batched.engine import Engine
from turnout.client.batched.schedule import IntArray, Schedule, pieces, shuffled, whole_sets
from turnout.client.batched.stacked_model import StackedModel
from turnout.client.minibatches import generator
from turnout.client.options import TrainOptions
from turnout.client.training_parts import TrainingParts
from turnout.client.work import Descent, Work
from turnout.tasks.task import AdmmSolver, Vector

_PIECE: Final = 256
_NO_PARTS: Final = TrainingParts(torch.nn.Identity())


class CohortRound(Work):
    """One instruction to C clients, those with more examples first."""

    def __init__(
        self,
        work: CohortWork,
        clients: Sequence[int],
        examples: Examples,
        state: CohortState,
        model: StackedModel,
        engine: Engine,
        options: TrainOptions,
    ) -> None:
        self.server_round = work.server_round
        self.local_update = work.local_update
        self.lr = work.lr
        self.config = work.config
        self.options = options
        self.model: StackedModel = model
        self.state = state
        self.clients = clients
        self.examples = examples
        self.engine = engine
        self._work = work
        self._active = len(clients)

    @property
    def who(self) -> str:
        """The clients, for messages."""
        if len(self.clients) == 1:
            return f"client {self.clients[0]}"
        return f"each of the clients {', '.join(str(client) for client in self.clients)}"

    def extra(self, key: str) -> Vector | None:
        """Return the request's record ``key``, shape (P,), or None when there is none."""
        return self._work.vectors.get(key)

    def received(self) -> Tensor:
        """Return the received model, shape (P,)."""
        return self.model.tensor(self._work.model)

    def schedule(self, server_round: int | None = None) -> Schedule:
        """Return the steps of one local training, ordered as in ``server_round`` (None: the request's)."""
        o, counts = self.options, self.examples.counts
        epochs = o.local_epochs or 1
        if counts[0] <= o.batch_size:
            return whole_sets(counts, epochs if o.local_steps is None else o.local_steps)
        generators = self._generators(server_round)
        return shuffled(counts, generators, batch_size=o.batch_size, steps=o.local_steps, epochs=epochs)

    def batches(self, server_round: int | None = None) -> Iterator[Batch]:
        """Yield the minibatches of one local training."""
        for batch in self.examples.batches(self.schedule(server_round), self.model.parameters.dtype):
            self._active = len(batch.sizes)
            yield batch

    def stepping(self, vector: Tensor) -> Tensor:
        """Return the rows of ``vector`` (C, P) of the clients that have the present batch."""
        return vector[: self._active]

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of each client of ``batch``, shape (a,)."""
        return self.engine.loss(batch)

    def gradient(self, batch: Batch) -> Tensor:
        """Put the gradients into the first rows of ``model.gradient``; return the losses, shape (a,)."""
        losses = self.engine.gradient(batch)
        self.add_weight_decay(len(batch.sizes))
        return losses

    def large_batch_gradient(self, size: int | None = None) -> Vector:
        """Put the mean gradients over ``size`` random examples (None: all) into ``model.gradient``."""
        counts = self.examples.counts
        rows: list[IntArray | None] = [None] * len(counts)
        if size is not None and size < counts[0]:
            rows = [
                rng.choice(int(count), size, replace=False) if size < count else None
                for count, rng in zip(counts, self._generators(), strict=True)
            ]
            counts = np.minimum(counts, size)
        schedule = pieces(counts, rows, min(_PIECE, int(counts[0])))
        total = self.model.parameters.new_zeros(len(counts))
        for k, batch in enumerate(self.examples.batches(schedule, total.dtype, counts)):
            total[: len(batch.sizes)] += self.engine.gradient(batch, accumulate=k > 0)
        self.add_weight_decay(len(counts))
        return total.double().cpu().numpy()

    def mean_loss(self, losses: list[Tensor]) -> Vector:
        """Return the mean of each client's losses, shape (C,)."""
        total, steps = torch.zeros_like(losses[0]), np.zeros(len(losses[0]))
        for loss in losses:
            total[: len(loss)] += loss
            steps[: len(loss)] += 1
        mean: Vector = total.double().cpu().numpy() / steps
        return mean

    def descend(
        self,
        *,
        centre: Tensor | None = None,
        rho: float = 0.0,
        linear: Tensor | None = None,
        server_round: int | None = None,
    ) -> Descent:
        """Train the models in place, see `Work.descend`."""
        return descend(self, centre=centre, rho=rho, linear=linear, server_round=server_round)

    def add_weight_decay(self, a: int) -> None:
        """Add the weight decay to the first ``a`` gradients, where the optimizer does not."""
        if self.options.weight_decay and self.options.own_sgd:
            model = self.model
            model.gradient[:a].add_(model.parameters[:a], alpha=self.options.weight_decay)
            for piece in model.frozen:
                model.gradient[:a, piece] = 0.0

    def start_parts(self, server_round: int | None = None) -> TrainingParts:
        """Return no parts: models that have some are trained one client at a time."""
        return _NO_PARTS

    def admm_solver(self, rho: float) -> AdmmSolver | None:
        """Return None: clients with a closed form are worked on one by one."""
        return None

    def whole_loss(self, vector: Vector) -> float:
        """Raise: only clients with a closed form are asked."""
        raise NotImplementedError("clients with a closed form are worked on one by one")

    def _generators(self, server_round: int | None = None) -> list[np.random.Generator]:
        now = self.server_round if server_round is None else server_round
        return [generator(self.options.seed, client, now) for client in self.clients]
