"""From a checked experiment to the objects that run it: task, participation, clients, grid, strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from turnout.client import client_app
from turnout.experiment.check import KNOWN, blamed
from turnout.experiment.model import Experiment
from turnout.experiment.options import NONE_WORD, accepted_options
from turnout.experiment.participation import build_participation
from turnout.simulation import LocalGrid
from turnout.simulation.participation import ParticipationModel
from turnout.strategies import StreamingStrategy
from turnout.tasks import Task
from turnout.wire import ConfigError, find

T = TypeVar("T")


@dataclass(frozen=True)
class Federation:
    """Everything that one simulated run needs."""

    task: Task
    participation: ParticipationModel
    grid: LocalGrid
    strategy: StreamingStrategy


def build(experiment: Experiment, *, task: Task | None = None) -> Federation:
    """Make the objects of ``experiment``, reading its data unless ``task`` is one made from the same section.

    Raises `ConfigError` with the place of the value that does not fit, `DataError` when data are missing.
    """
    seed = experiment.run.seed
    if task is None:
        task = _made(experiment, "task", experiment.task.options, lambda: _build_task(experiment))
    data = task
    participation = _made(
        experiment,
        "participation",
        experiment.participation.options,
        lambda: build_participation(experiment.participation, data, seed),
    )
    strategy = _made(
        experiment,
        "strategy",
        experiment.strategy.options,
        lambda: _build_strategy(experiment, data, participation),
    )
    simulation = experiment.simulation
    app = _made(
        experiment,
        "client",
        experiment.client,
        lambda: client_app(
            data, **_spoken({"seed": seed, **experiment.client}), mods=_build_mods(experiment, seed)
        ),
    )
    grid = _made(
        experiment,
        "simulation",
        ("executor", "workers"),
        lambda: LocalGrid(
            app,
            task.num_clients,
            participation=participation,
            executor=simulation.executor,
            workers=simulation.workers,
            seed=seed,
        ),
    )
    return Federation(task, participation, grid, strategy)


def _build_task(experiment: Experiment) -> Task:
    target = find("task", experiment.task.name).target
    options = _spoken(experiment.task.options)
    if "seed" in accepted_options(target)[0]:
        options.setdefault("seed", experiment.run.seed)
    task: Task = target(**options)
    return task


def _build_strategy(
    experiment: Experiment, task: Task, participation: ParticipationModel
) -> StreamingStrategy:
    options = _spoken(experiment.strategy.options)
    if options.get("participation") == KNOWN:
        # Clients that never come need no weight, and 1 / 0 is none.
        options["participation"] = {i: float(p) for i, p in enumerate(participation.rates) if p > 0}
    options.setdefault("seed", experiment.run.seed)
    strategy: StreamingStrategy = find("strategy", experiment.strategy.name).target(**options)
    cohort = getattr(strategy, "clients_per_round", None)
    if cohort is not None and cohort > task.num_clients:
        raise ConfigError(
            f"clients_per_round={cohort}, but the task has num_clients={task.num_clients}; lower it to that."
        )
    return strategy


def _build_mods(experiment: Experiment, seed: int) -> list[Any]:
    if experiment.link is None:
        return []
    return [find("link", experiment.link.name).target(**_spoken({"seed": seed, **experiment.link.options}))]


def _spoken(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with the word that TOML needs for None replaced by None."""
    return {key: None if value == NONE_WORD else value for key, value in options.items()}


def _made(experiment: Experiment, section: str, options: Any, make: Callable[[], T]) -> T:
    """Run ``make``; an error about a value gets the place where it was written."""
    try:
        return make()
    except ConfigError as error:
        path = blamed(section, options, str(error))
        raise experiment.source.error(path, f"[{section}] {error}") from error
