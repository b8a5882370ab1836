"""The executors by name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from turnout.simulation.batched_trainer import BatchedCohortTrainer
from turnout.simulation.clients import LocalClients
from turnout.simulation.cohort_trainer import CohortTrainer
from turnout.simulation.executors.base import Executor
from turnout.simulation.executors.batched import BatchedExecutor
from turnout.simulation.executors.processes import ProcessesExecutor
from turnout.simulation.executors.serial import SerialExecutor
from turnout.simulation.executors.threads import ThreadsExecutor
from turnout.wire.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from turnout.client.app import Trainer

EXECUTORS: Final = ("serial", "threads", "processes", "batched")


def make_executor(name: str, clients: LocalClients, workers: int | None = None) -> Executor:
    """Return the executor called ``name`` for ``clients``.

    ``workers`` is how many clients run at once; None means one per CPU, and ``"serial"`` always runs one.
    Raises `ConfigError` for an unknown name or fewer than one worker.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ConfigError(
            f"workers must be an integer of at least 1, or None for one per CPU, got {workers!r}."
        )
    size = workers or os.cpu_count() or 1
    if name == "serial":
        return SerialExecutor(clients)
    if name == "threads":
        return ThreadsExecutor(clients, size)
    trainer = bare_trainer(clients)
    if name == "processes" or trainer is None:
        return ProcessesExecutor(clients, size, None if trainer is None else CohortTrainer(clients, trainer))
    batched = BatchedCohortTrainer(clients, trainer)
    if size == 1 or batched.batched.device.type != "cpu":
        return BatchedExecutor(clients, batched)
    return ProcessesExecutor(clients, size, batched)


def bare_trainer(clients: LocalClients) -> Trainer | None:
    """Return the trainer of an app made by `client_app` without mods, else None: then messages it must be."""
    app = clients.client_app
    trainer: Trainer | None = getattr(app, "trainer", None) if getattr(app, "bare", False) else None
    return trainer
