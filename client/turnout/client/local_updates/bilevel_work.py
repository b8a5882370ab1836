"""What the two BO-REP local updates share: a client's variables, minibatches and losses on both levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from turnout.client.local_round import LocalRound
from turnout.client.work import Work
from turnout.tasks.bilevel import Batch, BilevelTask
from turnout.tasks.task import ClientData, Vector
from turnout.wire.errors import ConfigError


@dataclass(slots=True)
class BilevelWork:
    """One client's problem. ``shared`` are the model's parameters, ``own`` the level that it keeps."""

    work: LocalRound
    task: BilevelTask
    own: list[Tensor]
    shared: list[Tensor]
    upper_data: ClientData
    rng: np.random.Generator

    @classmethod
    def of(cls, work: Work, shared: Literal["upper", "lower"]) -> BilevelWork:
        """Return the problem of ``work``; `ConfigError` when its task is not of that kind."""
        task = getattr(work, "task", None)
        if not isinstance(work, LocalRound) or not isinstance(task, BilevelTask) or task.shared != shared:
            known = {"upper": "hyper-representation", "lower": "hyper-cleaning"}[shared]
            raise ConfigError(
                f"local update {work.local_update!r} needs a bilevel task that shares its {shared} level, "
                f"got {getattr(task, 'name', 'another')!r}; use task.name = {known!r}, or a BilevelTask of "
                "your own."
            )
        work.model.train(True)
        device, dtype = work.model.parameters.device, work.model.parameters.dtype
        own = [t.to(device, dtype).requires_grad_() for t in task.initial_own(work.client)]
        data = task.upper_data(work.client)
        upper = ClientData(data.x.to(device), data.y.to(device))
        shared_variables: list[Tensor] = list(work.model.module.parameters())
        return cls(work, task, own, shared_variables, upper, work.generator())

    def upper_loss(self) -> Tensor:
        """Return f on a fresh minibatch."""
        batch, _ = self._draw(self.upper_data)
        return self.task.upper_loss(self.work.model.module, self.own, batch)

    def lower_loss(self) -> Tensor:
        """Return g on a fresh minibatch."""
        batch, rows = self._draw(self.work.data)
        return self.task.lower_loss(self.work.model.module, self.own, batch, rows)

    def _draw(self, data: ClientData) -> tuple[Batch, Tensor]:
        size = self.work.options.batch_size
        if size >= len(data):
            return (data.x, data.y), torch.arange(len(data), device=data.y.device)
        rows = torch.from_numpy(self.rng.choice(len(data), size, replace=False)).to(data.y.device)
        return (data.x.index_select(0, rows), data.y.index_select(0, rows)), rows

    def take_own(self, vector: Vector) -> None:
        """Copy ``vector`` into the client's own level."""
        for variable, piece in zip(self.own, cut(self.work.model.tensor(vector), self.own), strict=True):
            variable.data.copy_(piece)

    @property
    def own_size(self) -> int:
        """Number of variables of the client's own level."""
        return sum(v.numel() for v in self.own)


def flat(tensors: list[Tensor]) -> Tensor:
    """Return ``tensors`` as one new vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def cut(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return ``vector`` as views with the shapes of ``like``."""
    pieces = torch.split(vector, [v.numel() for v in like])
    return [piece.reshape(v.shape) for piece, v in zip(pieces, like, strict=True)]
