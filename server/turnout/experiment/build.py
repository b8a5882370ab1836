"""From a checked experiment to the objects that run it: task, participation, clients, grid, strategy.

Nothing here imports PyTorch before a task or an app is made: a server that resumes a run needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from turnout.experiment.check import KNOWN, blamed
from turnout.experiment.methods import find_strategy, load_methods, load_methods_of
from turnout.experiment.model import Experiment
from turnout.experiment.options import NONE_WORD, accepted_options
from turnout.experiment.participation import Clients, build_participation
from turnout.experiment.sections import EXTERNAL as EXTERNAL
from turnout.simulation import LocalGrid
from turnout.simulation.participation import ParticipationModel
from turnout.strategies import StreamingStrategy
from turnout.wire import ConfigError, find

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from turnout.peft import AdapterConfig
    from turnout.tasks import Task

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
    if experiment.task.name == EXTERNAL:
        _own_app(experiment)  # Without one there is nothing to read data for.
    data = make_task(experiment) if task is None else task
    participation = make_participation(experiment, data)
    strategy = make_strategy(experiment, data.num_clients, participation, lambda: data)
    app = make_app(experiment, data)
    simulation = experiment.simulation
    grid = _made(
        experiment,
        "simulation",
        ("executor", "workers", "exact"),
        lambda: LocalGrid(
            app,
            data.num_clients,
            participation=participation,
            executor=simulation.executor,
            workers=simulation.workers,
            exact=simulation.exact,
            seed=experiment.run.seed,
        ),
    )
    return Federation(data, participation, grid, strategy)


def make_task(experiment: Experiment) -> Task:
    """Return the task, its data read. Raises `ConfigError` with the value's place, `DataError`."""
    task = _made(experiment, "task", experiment.task.options, lambda: _build_task(experiment))
    options = experiment.peft.options if experiment.peft is not None else ()
    return _made(experiment, "peft", options, lambda: _adapted(experiment, task))


def make_participation(experiment: Experiment, clients: Clients) -> ParticipationModel:
    """Return who takes part when. Raises `ConfigError` with the value's place."""
    section = experiment.participation
    return _made(
        experiment,
        "participation",
        section.options,
        lambda: build_participation(section, clients, experiment.run.seed),
    )


def make_strategy(
    experiment: Experiment,
    num_clients: int,
    participation: ParticipationModel,
    task: Callable[[], Task],
) -> StreamingStrategy:
    """Return the strategy; ``task`` is asked for what adapters share. Raises `ConfigError` with the place."""
    strategy = _made(
        experiment,
        "strategy",
        experiment.strategy.options,
        lambda: _build_strategy(experiment, num_clients, participation),
    )
    if experiment.peft is not None:
        from turnout.experiment.adapters import couple

        options, steps = experiment.peft.options, _spoken(experiment.client).get("local_steps")
        _made(experiment, "peft", options, lambda: couple(strategy, _config(experiment), task, steps))
    return strategy


def make_app(experiment: Experiment, task: Task, *, device: str | None = None) -> ClientApp:
    """Return the clients' app; ``device`` replaces the experiment's. Raises `ConfigError`."""
    if experiment.task.name == EXTERNAL:
        return _own_app(experiment)
    from turnout.client.app import client_app

    options = _spoken({"seed": experiment.run.seed, **experiment.client})
    if device is not None:
        options["device"] = device
    return _made(
        experiment,
        "client",
        experiment.client,
        lambda: client_app(task, **options, mods=_build_mods(experiment, experiment.run.seed)),
    )


def _own_app(experiment: Experiment) -> ClientApp:
    path = experiment.task.options.get("app")
    if path is None:
        raise experiment.source.error(
            ("task", "name"),
            f"task.name = {EXTERNAL!r} has no data and no clients of its own, so it cannot be simulated; "
            'name their Flower app (task.app = "module:attribute"), or run turnout server FILE, and turnout '
            "client --app MODULE:ATTRIBUTE for its clients.",
        )
    from turnout.experiment.own_app import load_app

    try:
        return load_app(path, "task.app")
    except ConfigError as error:
        raise experiment.source.error(("task", "app"), str(error)) from error


def _build_task(experiment: Experiment) -> Task:
    load_methods_of(experiment.task.name)  # A resumed run was not checked again.
    target = find("task", experiment.task.name).target
    options = _spoken(experiment.task.options)
    if "seed" in accepted_options(target)[0]:
        seed = options.setdefault("seed", experiment.run.seed)
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed={seed} is not possible; use a whole number from 0 to {2**63 - 1}.")
    task: Task = target(**options)
    return task


def _adapted(experiment: Experiment, task: Task) -> Task:
    """Return ``task`` with the experiment's adapters on its model."""
    if experiment.peft is None:
        return task
    from turnout.peft import AdaptedTask

    adapted = AdaptedTask(task, _config(experiment))
    adapted.model()  # What does not fit the model fails here, not in the first client.
    return adapted


def _config(experiment: Experiment) -> AdapterConfig:
    """Return the configuration of the experiment's adapters."""
    load_methods()
    assert experiment.peft is not None
    options = _spoken({"seed": experiment.run.seed, **experiment.peft.options})
    config: AdapterConfig = find("adapter", experiment.peft.name).target(**options)
    return config


def _build_strategy(
    experiment: Experiment, num_clients: int, participation: ParticipationModel
) -> StreamingStrategy:
    options = _spoken(experiment.strategy.options)
    if options.get("participation") == KNOWN:
        rates = participation.rates
        # Clients that never come need no weight, and 1 / 0 is none.
        missing = not rates.all()
        options["participation"] = {i: float(p) for i, p in enumerate(rates) if p > 0} if missing else rates
    options.setdefault("seed", experiment.run.seed)
    strategy: StreamingStrategy = find_strategy(experiment.strategy.name).target(**options)
    cohort = getattr(strategy, "clients_per_round", None)
    if cohort is not None and cohort > num_clients:
        raise ConfigError(
            f"clients_per_round={cohort}, but the task has num_clients={num_clients}; lower it to that."
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
