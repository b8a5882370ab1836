"""An experiment on Flower's engines: the server's side for a ``ServerApp``, the clients' for a ``ClientApp``.

Both read the same file and the app's run config, as ``flwr run --run-config`` gives it to every process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from turnout.experiment.build import make_app, make_participation, make_strategy, make_task
from turnout.experiment.model import Experiment, load_experiment
from turnout.experiment.recorded import (
    RunSummary,
    create_recorder,
    evaluation,
    find_run,
    open_store,
    plot_recorded,
    resume_recorder,
)
from turnout.server.flower import CommitCallback, FlowerGrid
from turnout.strategies import Callback
from turnout.wire.torch_threads import one_torch_thread


def experiment_of(run_config: Mapping[str, Any], file: str | Path) -> Experiment:
    """Return the experiment that an app's run config describes.

    ``experiment`` names a file instead of ``file``, ``set`` is as ``--set`` of the command line, several of
    them separated by spaces (``"run.rounds=5 client.lr=0.05"``), ``strategy`` picks a strategy or an alias of
    ``[strategies.NAME]``. Raises `ConfigError`.
    """
    overrides = str(run_config.get("set", "")).split()
    experiment = load_experiment(str(run_config.get("experiment") or file), overrides)
    strategy = str(run_config.get("strategy") or experiment.strategy.name)
    return experiment if strategy == experiment.strategy.name else experiment.variant(strategy)


def run_on_flower(
    experiment: Experiment,
    grid: Grid,
    *,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    plots: bool = True,
) -> RunSummary:
    """Run ``experiment`` on the grid of a Flower ``ServerApp`` and record it, as a simulation is recorded.

    The section ``fleet`` says how it deals with clients that are remote: ``participation``, ``min_clients``,
    ``wait``, ``timeout``. ``resume`` continues a run after its last committed round, also when SuperLink and
    nodes were started anew; clients then go back to their state of it (see `turnout.client.at_home`).

    Raises as `turnout.simulation.run.simulate` does.
    """
    task = make_task(experiment)
    participation = make_participation(experiment, task)
    strategy = make_strategy(experiment, task.num_clients, participation)
    fleet = experiment.fleet
    with open_store(experiment) as store:
        checkpoint = None
        if resume is None:
            recorder = create_recorder(experiment, store, num_clients=task.num_clients)
        else:
            recorder, checkpoint = resume_recorder(experiment, store, find_run(store, resume))
        with recorder:
            recorder.executor = f"Flower ({type(grid).__name__})"
            engine = FlowerGrid(
                grid,
                num_clients=task.num_clients,
                participation=participation if fleet.participation == "experiment" else None,
                min_clients=fleet.min_clients,
                wait=fleet.wait,
                run=recorder.run.id,
            )
            strategy.start(
                engine,
                task.initial_arrays(),
                num_rounds=experiment.run.rounds,
                timeout=fleet.timeout,
                evaluate_fn=evaluation(experiment, lambda: task, recorder),
                resume_from=checkpoint,
                callbacks=[
                    recorder,
                    CommitCallback(engine, every=experiment.run.checkpoint_every),
                    *callbacks,
                ],
            )
        if plots:
            plot_recorded(store, recorder, task, participation.rates)
        return RunSummary.of(recorder)


class ExperimentApp(ClientApp):
    """The clients of the experiment that the app's run config describes; built at the first message."""

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self._file = str(file)
        self._built: tuple[dict[str, Any], ClientApp] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_built": None}

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer ``message`` as the experiment's clients do."""
        app = self._app(dict(context.run_config))
        with one_torch_thread():
            return app(message, context)

    def _app(self, run_config: dict[str, Any]) -> ClientApp:
        with _building:
            if self._built is None or self._built[0] != run_config:
                experiment = experiment_of(run_config, self._file)
                self._built = run_config, make_app(experiment, make_task(experiment))
            return self._built[1]


_building = threading.Lock()
