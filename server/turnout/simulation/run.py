"""One simulated run, recorded: build what the experiment describes, run it, keep everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flwr.app import ArrayRecord, MetricRecord

from turnout.experiment import Experiment
from turnout.experiment.build import Federation, build
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.run_plots import plot_run, plot_task
from turnout.server.schema import RunRow
from turnout.server.store import RunStore
from turnout.strategies import Callback
from turnout.tasks import Task
from turnout.wire import ConfigError

# Keys that change where or how fast a run is computed, not what.
_HARMLESS: Final = (
    "run.name",
    "run.directory",
    "run.store",
    "run.checkpoint_every",
    "run.evaluate_every",
    "run.target_accuracy",
    "simulation.",
)


@dataclass(frozen=True)
class RunSummary:
    """What came of a run: ``metrics`` of the final model on held-out data, ``seconds`` over all its parts."""

    run_id: str
    rounds: int
    metrics: dict[str, float]
    model_sha256: str
    seconds: float
    directory: Path

    def document(self) -> dict[str, Any]:
        """Return the summary as ``--json`` prints it."""
        return {
            "run_id": self.run_id,
            "rounds": self.rounds,
            "metrics": self.metrics,
            "model_sha256": self.model_sha256,
            "seconds": round(self.seconds, 3),
        }


def open_store(experiment: Experiment) -> RunStore:
    """Return the store that the experiment names, by default the one in its directory of runs."""
    return RunStore(experiment.run.store or experiment.run.directory)


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
    with open_store(experiment) as store:
        recorder, checkpoint = _recorder(experiment, federation, store, resume, study)
        with recorder:
            if started is not None:
                started(recorder)
            federation.strategy.start(
                federation.grid,
                federation.task.initial_arrays(),
                num_rounds=experiment.run.rounds,
                evaluate_fn=_evaluation(experiment, federation.task, recorder),
                resume_from=checkpoint,
                callbacks=[recorder, *callbacks],
            )
        if plots:
            plot_run(store, store.run(recorder.run.id), recorder.directory.plots)
            plot_federation(federation, recorder.directory.plots)
        return RunSummary(
            run_id=recorder.run.id,
            rounds=recorder.last_round,
            metrics=recorder.last_metrics,
            model_sha256=recorder.model_sha256 or "",
            seconds=recorder.seconds,
            directory=recorder.directory.path,
        )


def plot_federation(federation: Federation, folder: Path) -> list[Path]:
    """Plot which client holds which data, for tasks with labels; return the files written."""
    task = federation.task
    try:
        labels = task.label_distribution()
    except ConfigError:
        return []
    sizes = [task.num_examples(client) for client in range(task.num_clients)]
    return plot_task(labels, sizes, federation.participation.rates, folder)


def find_run(store: RunStore, name: str | Path) -> RunRow:
    """Return the run that ``name`` means: an id, the start of one, ``"last"``, or a run directory."""
    path = Path(name)
    is_directory = (path / "experiment.toml").is_file()
    return store.run(path.resolve().name.rpartition("-")[2] if is_directory else str(name))


def differing_keys(experiment: Experiment, run: RunRow) -> list[str]:
    """Return what ``experiment`` would compute differently from ``run``, as ``key (was old, is new)``."""
    new, old = _flat(experiment.resolved()), _flat(run.config)
    return [
        f"{key} (was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r})"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) and key != "run.rounds" and not key.startswith(_HARMLESS)
    ]


def _recorder(
    experiment: Experiment,
    federation: Federation,
    store: RunStore,
    resume: str | Path | None,
    study: str | None,
) -> tuple[RunRecorder, dict[str, Any] | None]:
    run = experiment.run
    if resume is None:
        description = RunDescription(
            name=run.name,
            strategy=experiment.label,
            task=experiment.task.name,
            seed=run.seed,
            num_rounds=run.rounds,
            num_clients=federation.task.num_clients,
            config=experiment.resolved(),
            study=study,
        )
        created = RunRecorder.create(store, run.directory, description, checkpoint_every=run.checkpoint_every)
        return created, None
    row = find_run(store, resume)
    differing = differing_keys(experiment, row)
    if differing:
        raise ConfigError(
            f"run {row.id} cannot be resumed with this experiment, which differs in: {'; '.join(differing)}. "
            "Set these back, or start a new run without --resume."
        )
    if run.rounds < row.num_rounds:
        raise ConfigError(
            f"run.rounds = {run.rounds}: run {row.id} was made for {row.num_rounds} rounds; when resuming, "
            "rounds may grow but not shrink."
        )
    return RunRecorder.resume(
        store,
        row,
        num_rounds=run.rounds,
        config=experiment.resolved(),
        checkpoint_every=run.checkpoint_every,
    )


def _evaluation(
    experiment: Experiment, task: Task, recorder: RunRecorder
) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return the server's evaluation; the initial model's is recorded here, since no round reports it."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        due = server_round % experiment.run.evaluate_every == 0 or server_round == experiment.run.rounds
        metrics = task.evaluate(arrays) if due else {}
        if server_round == 0 and metrics:
            recorder.record_initial(metrics)
        return MetricRecord(dict(metrics)) if metrics else None

    return evaluate


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
