"""One simulated run, recorded: build what the experiment describes, run it, keep everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.experiment.recorded import (
    RunSummary,
    create_recorder,
    evaluation,
    find_run,
    open_store,
    plot_recorded,
    resume_recorder,
)
from turnout.server.recorder import RunRecorder
from turnout.strategies import Callback

if TYPE_CHECKING:
    from turnout.tasks import Task


def simulate(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    started: Callable[[RunRecorder], None] | None = None,
    study: str | None = None,
    task: Task | None = None,
    plots: bool = True,
) -> RunSummary:
    """Run ``experiment`` in this process and record it.

    ``resume`` continues a run (its id, its directory, or ``"last"``) after its last committed round, bit for
    bit; the experiment must be the run's own, except that it may have more rounds. ``callbacks``
    see each round once it is committed, ``started`` the recorder before the first. An exception ends the run,
    which can then be resumed; KeyboardInterrupt marks it interrupted. Runs of a comparison have the same
    ``study`` and may share one ``task``, made from the same section.

    Raises `ConfigError` for an experiment that cannot be run or resumed, `DataError` for missing data,
    `StoreError` when the run store cannot be used. Then nothing is left behind.
    """
    federation = build(experiment, task=task)
    data = federation.task
    with open_store(experiment) as store:
        checkpoint = None
        if resume is None:
            recorder = create_recorder(experiment, store, num_clients=data.num_clients, study=study)
        else:
            recorder, checkpoint = resume_recorder(experiment, store, find_run(store, resume))
        with recorder:
            recorder.executor = federation.grid.executor
            if started is not None:
                started(recorder)
            federation.strategy.start(
                federation.grid,
                data.initial_arrays(),
                num_rounds=experiment.run.rounds,
                evaluate_fn=evaluation(experiment, lambda: data, recorder),
                resume_from=checkpoint,
                callbacks=[recorder, *callbacks],
            )
        if plots:
            plot_recorded(store, recorder, data, federation.participation.rates)
        return RunSummary.of(recorder)
