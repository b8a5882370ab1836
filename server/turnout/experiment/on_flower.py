"""An experiment on Flower's engines: what a ``ServerApp`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flwr.serverapp import Grid

from turnout.experiment.build import make_participation, make_strategy, make_task
from turnout.experiment.model import Experiment
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
    strategy = make_strategy(experiment, task.num_clients, participation, lambda: task)
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
