"""The executors by name, and which one `auto` picks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from turnout.simulation.batched_trainer import BatchedCohortTrainer
from turnout.simulation.clients import LocalClients
from turnout.simulation.cohort_trainer import CohortTrainer
from turnout.simulation.executors.base import Executor
from turnout.simulation.executors.batched import BatchedExecutor
from turnout.simulation.executors.processes import ProcessesExecutor
from turnout.simulation.executors.serial import SerialExecutor
from turnout.simulation.executors.threads import ThreadsExecutor
from turnout.simulation.workers.pool import can_fork
from turnout.wire.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from turnout.client.app import Trainer

AUTO: Final = "auto"
# Up to here, a client's step costs more in calls than in arithmetic, however the gradient is computed.
_FEW_PARAMETERS: Final = 20_000


@dataclass(frozen=True)
class Choice:
    """An executor, and in words which one it is and why."""

    executor: Executor
    name: str
    words: str


def choose_executor(
    name: str,
    clients: LocalClients,
    workers: int | None = None,
    *,
    exact: bool = True,
    cohort: float = 2.0,
) -> Choice:
    """Return the executor called ``name`` for ``clients``.

    ``workers`` is how many clients run at once; None means one per CPU, and ``"serial"`` always runs one.
    ``"auto"`` goes by the app, the model, the device and ``cohort``, the clients expected in a round; only
    with ``exact=False`` it picks ``"batched"``, whose results are the others' up to rounding.

    Raises `ConfigError` for an unknown name, fewer than one worker, or an executor that this system lacks.
    """
    if name not in (AUTO, *EXECUTORS):
        raise unknown_name("executor", name, (AUTO, *EXECUTORS))
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ConfigError(
            f"workers must be an integer of at least 1, or None for one per CPU, got {workers!r}."
        )
    size = min(workers or os.cpu_count() or 1, clients.num_clients)  # More would have nothing to do.
    why = ""
    if name == AUTO:
        name, why = _pick(clients, size, exact=exact, cohort=cohort)
    executor = EXECUTORS[name](clients, size)
    count = getattr(executor, "workers", 1)
    words = name if count == 1 else f"{name}, {count} workers"
    return Choice(executor, name, f"{words} ({why})" if why else words)


def _serial(clients: LocalClients, size: int) -> Executor:
    return SerialExecutor(clients)


def _processes(clients: LocalClients, size: int) -> Executor:
    trainer = bare_trainer(clients)
    cohorts = None if trainer is None else CohortTrainer(clients, trainer)
    return ProcessesExecutor(clients, size, cohorts, instead=SerialExecutor(clients))


def _batched(clients: LocalClients, size: int) -> Executor:
    trainer = bare_trainer(clients)
    if trainer is None:
        raise ConfigError(
            "executor='batched' trains the clients of client_app() without mods (a link is one); use "
            "executor='processes' for other apps."
        )
    batched = BatchedCohortTrainer(clients, trainer)
    here = BatchedExecutor(clients, batched)
    if size == 1 or not can_fork() or batched.batched.device.type != "cpu":
        return here
    return ProcessesExecutor(clients, size, batched, instead=here)


EXECUTORS: Final[dict[str, Callable[[LocalClients, int], Executor]]] = {
    "serial": _serial,
    "threads": ThreadsExecutor,
    "processes": _processes,
    "batched": _batched,
}
"""What ``LocalGrid(executor=...)`` can name besides ``"auto"``: how clients are run."""


def bare_trainer(clients: LocalClients) -> Trainer | None:
    """Return the trainer of an app made by `client_app` without mods, else None: then messages it must be."""
    app = clients.client_app
    trainer: Trainer | None = getattr(app, "trainer", None) if getattr(app, "bare", False) else None
    return trainer


def _pick(clients: LocalClients, size: int, *, exact: bool, cohort: float) -> tuple[str, str]:
    """Return the name of the fastest executor that fits, and why it is that one."""
    if not hasattr(clients.client_app, "trainer"):
        # It may keep things in this process that a forked worker would not share.
        return ("threads", "an app of your own") if size > 1 else ("serial", "one worker")
    trainer = bare_trainer(clients)
    if trainer is not None and not exact:
        batched = BatchedCohortTrainer(clients, trainer).batched
        if batched.refusal("sgd") is None:
            if batched.device.type != "cpu":
                return "batched", f"one tensor program on {batched.device}"
            if batched.by_hand():
                return "batched", "this model's gradients are written by hand"
            if batched.size <= _FEW_PARAMETERS and cohort >= 2 * size:
                return "batched", f"a small model, {batched.size} parameters"
    if trainer is not None and not trainer.on_cpu:
        return "serial", "one device for all clients"
    if size == 1 or cohort < 2 or not can_fork():
        return "serial", "one client at a time" if size == 1 or cohort < 2 else "no fork on this system"
    return "processes", "one process per CPU" if size == os.cpu_count() else "processes in parallel"
