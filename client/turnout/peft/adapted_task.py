"""A task whose clients train adapters on its frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from turnout.peft.adapted import Adapted, attach
from turnout.peft.config import AdapterConfig
from turnout.tasks.task import ClientData, Task, Vector, building
from turnout.tasks.travelling import copy_sharing_frozen, travelling
from turnout.wire.arrays import as_array


class AdaptedTask(Task):
    """``task`` with adapters on its model: data, loss and metrics are the task's, what travels the adapters'.

    The base is the task's model as its seed makes it, built on first use: one frozen copy per process, shared
    by all models that come from here. Where ``config`` names no layers, the task's ``target_modules`` and
    ``modules_to_save`` count. There are no closed-form ADMM steps: those are of the whole model.
    """

    def __init__(self, task: Task, config: AdapterConfig) -> None:
        self.task = task
        self.name = task.name
        self.num_clients = task.num_clients
        self.seed = task.seed
        self.chunk_size = task.chunk_size
        changes: dict[str, Any] = {}
        if config.target_modules is None and task.target_modules is not None:
            changes["target_modules"] = task.target_modules
        if config.modules_to_save is None and task.modules_to_save is not None:
            changes["modules_to_save"] = task.modules_to_save
        self.config = replace(config, **changes)
        self._prototype: nn.Module | None = None
        self._first_shared: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prototype": None}

    def model(self) -> nn.Module:
        """Return a new adapted model on the shared base."""
        return self.seeded_model(self.seed)

    def seeded_model(self, seed: int) -> nn.Module:
        """Return a new adapted model on the shared base; it follows from the seeds of task and config."""
        with building:
            if self._prototype is None:
                adapted = attach(self.task.seeded_model(self.task.seed), self.config)
                self._prototype, self._first_shared = adapted.module, adapted.shared_state()
            return copy_sharing_frozen(self._prototype)

    def shared_arrays(self) -> dict[str, Vector]:
        """Return what the server must fix for all clients, as a run starts with it; empty for most methods.

        Models that come from here have it again, if it was replaced.
        """
        self.model()
        arrays = {name: tensor.numpy().copy() for name, tensor in self._first_shared.items()}
        self.load_shared_arrays(arrays)
        return arrays

    def load_shared_arrays(self, arrays: Mapping[str, Vector]) -> None:
        """Make models with these `shared_arrays` from now on. Raises `ConfigError` for others' ones."""
        self.model()
        prototype = self._prototype
        assert prototype is not None  # Just made.
        with building:
            Adapted.of(prototype).load_shared_state(
                {name: torch.tensor(array) for name, array in arrays.items()}
            )

    def refreshed(self, arrays: ArrayRecord) -> tuple[ArrayRecord, dict[str, Vector]]:
        """Pick what is shared anew, from the weights of ``arrays``; return the model and the new state.

        The model's function stays as it was. Models that come from here have the new state.
        """
        adapted = Adapted.of(self.loaded_model(arrays))
        self.config.refresh(adapted.layers)
        shared = {name: tensor.numpy().copy() for name, tensor in adapted.shared_state().items()}
        self.load_shared_arrays(shared)
        record = ArrayRecord()
        for name, tensor in travelling(adapted.module).items():
            record[name] = as_array(tensor.detach().numpy().copy())
        return record, shared

    def client_data(self, client: int) -> ClientData:
        """Return the task's training examples of ``client``."""
        return self.task.client_data(client)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the task's loss."""
        return self.task.loss(output, y)

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        """Return the task's metrics."""
        return self.task.metrics(output, y)

    def test_data(self) -> ClientData | None:
        """Return the task's held-out examples."""
        return self.task.test_data()

    def num_examples(self, client: int) -> int:
        """Return the number of training examples of ``client``."""
        return self.task.num_examples(client)

    def label_distribution(self) -> Vector:
        """Return the task's label distribution."""
        return self.task.label_distribution()

    def evaluate_model(self, model: nn.Module, data: ClientData) -> dict[str, float]:
        """Return the task's metrics of ``model`` on ``data``."""
        return self.task.evaluate_model(model, data)
