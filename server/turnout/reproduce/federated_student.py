"""A small federation for the studies of adapters: clients share one data set; the real strategy and grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from turnout.client.app import client_app
from turnout.experiment.adapters import couple
from turnout.peft import Adapted, AdaptedTask, AdapterConfig
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg
from turnout.strategies.rounds import Callback, RoundReport
from turnout.tasks.task import ClientData, Task
from turnout.wire import view


class StudentTask(Task):
    """Clients with equal shares of (x, y), shares of consecutive examples."""

    name = "student"

    def __init__(
        self,
        make: Callable[[], nn.Module],
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        num_clients: int,
    ) -> None:
        self._make, self._x, self._y, self._loss = make, x, y, loss
        self.num_clients = num_clients

    def model(self) -> nn.Module:
        """Return the student."""
        return self._make()

    def client_data(self, client: int) -> ClientData:
        """Return the client's share."""
        rows = torch.from_numpy(np.array_split(np.arange(len(self._y)), self.num_clients)[client])
        return ClientData(self._x[rows], self._y[rows])

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the study's loss."""
        return self._loss(output, y)


@dataclass(frozen=True)
class Federated:
    """The global model at the end, and the bytes of arrays that a client sent in each round."""

    adapted: Adapted
    uplink_bytes: list[int]


def federate(task: Task, config: AdapterConfig, *, rounds: int, steps: int, **client: Any) -> Federated:
    """Run FedAvg for ``rounds`` rounds of ``steps`` steps; ``client`` are the options of `client_app`."""
    adapted_task = AdaptedTask(task, config)
    strategy = FedAvg(num_clients=task.num_clients)
    couple(strategy, config, lambda: adapted_task, steps)
    app = client_app(adapted_task, local_steps=steps, **client)
    grid = LocalGrid(app, task.num_clients, executor="serial")
    sent = _count(grid)
    watch = _Rounds(sent)
    strategy.start(grid, adapted_task.initial_arrays(), num_rounds=rounds, callbacks=[watch])
    return Federated(Adapted.of(adapted_task.loaded_model(strategy.arrays())), watch.per_round)


class _Rounds(Callback):
    def __init__(self, sent: list[int]) -> None:
        self._sent = sent
        self.per_round: list[int] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.per_round.append(max(self._sent))
        self._sent.clear()


def _count(grid: LocalGrid) -> list[int]:
    """Make ``grid`` note the bytes of every reply's arrays."""
    sent: list[int] = []
    inner = grid.send_and_receive

    def counting(*given: Any, **told: Any) -> Any:
        for reply in inner(*given, **told):
            record = reply.content["arrays"]
            assert isinstance(record, ArrayRecord)
            sent.append(sum(view(array).nbytes for array in record.values()))
            yield reply

    grid.send_and_receive = counting  # type: ignore[method-assign]
    return sent
