"""What recorded runs have in common, whichever engine computes them: recorder, evaluation, summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flwr.app import ArrayRecord, MetricRecord

from turnout.experiment.model import Experiment
from turnout.experiment.sections import EXTERNAL
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.schema import RunRow
from turnout.server.store import RunStore
from turnout.wire import ConfigError

if TYPE_CHECKING:
    from turnout.tasks import Task

# Keys that change where or how fast a run is computed, not what.
_HARMLESS: Final = (
    "run.name",
    "run.directory",
    "run.store",
    "run.checkpoint_every",
    "run.evaluate_every",
    "run.target_accuracy",
    "simulation.",
    "fleet.",
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

    @classmethod
    def of(cls, recorder: RunRecorder) -> RunSummary:
        """Return the summary of a run that has just ended."""
        return cls(
            run_id=recorder.run.id,
            rounds=recorder.last_round,
            metrics=recorder.last_metrics,
            model_sha256=recorder.model_sha256 or "",
            seconds=recorder.seconds,
            directory=recorder.directory.path,
        )

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


def find_run(store: RunStore, name: str | Path) -> RunRow:
    """Return the run that ``name`` means: an id, the start of one, ``"last"``, or a run directory."""
    path = Path(name)
    is_directory = (path / "experiment.toml").is_file()
    return store.run(path.resolve().name.rpartition("-")[2] if is_directory else str(name))


def create_recorder(
    experiment: Experiment, store: RunStore, *, num_clients: int, study: str | None = None
) -> RunRecorder:
    """Make a new run of ``experiment``."""
    run = experiment.run
    description = RunDescription(
        name=run.name,
        strategy=experiment.label,
        task=experiment.task.name,
        seed=run.seed,
        num_rounds=run.rounds,
        num_clients=num_clients,
        config=experiment.resolved(),
        study=study,
    )
    return RunRecorder.create(store, run.directory, description, checkpoint_every=run.checkpoint_every)


def resume_recorder(
    experiment: Experiment, store: RunStore, row: RunRow
) -> tuple[RunRecorder, dict[str, Any] | None]:
    """Open the run ``row`` again; return its recorder and the checkpoint to go on from (None: the start).

    Raises `ConfigError` when ``experiment`` is not the run's own, except for more rounds.
    """
    run = experiment.run
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


def differing_keys(experiment: Experiment, run: RunRow) -> list[str]:
    """Return what ``experiment`` would compute differently from ``run``, as ``key (was old, is new)``."""
    new, old = _flat(experiment.resolved()), _flat(run.config)
    harmless = (*_HARMLESS, "client.") if experiment.task.name == EXTERNAL else _HARMLESS
    return [
        f"{key} (was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r})"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key) and key != "run.rounds" and not key.startswith(harmless)
    ]


def evaluation(
    experiment: Experiment, task: Callable[[], Task | None], recorder: RunRecorder
) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return the server's evaluation; the initial model's is recorded here, since no round reports it.

    ``task`` is called when the first evaluation is due, so that no round waits for data before; None cannot
    be evaluated.
    """

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0 and recorder.last_metrics:
            return None  # A run that is resumed at its start has this already.
        due = server_round % experiment.run.evaluate_every == 0 or server_round == experiment.run.rounds
        data = task() if due else None
        metrics = data.evaluate(arrays) if data is not None else {}
        if server_round == 0 and metrics:
            recorder.record_initial(metrics)
        return MetricRecord(dict(metrics)) if metrics else None

    return evaluate


def plot_recorded(store: RunStore, recorder: RunRecorder, task: Task | None, rates: Any) -> None:
    """Plot the run's curves, its participation, and, of a known task, which client holds which data."""
    from turnout.server.run_plots import plot_run

    plot_run(store, store.run(recorder.run.id), recorder.directory.plots)
    if task is not None:
        plot_clients(task, rates, recorder.directory.plots)


def plot_clients(task: Task, rates: Any, folder: Path) -> list[Path]:
    """Plot which client holds which data, for tasks with labels; return the files written."""
    from turnout.server.run_plots import plot_task

    try:
        labels = task.label_distribution()
    except ConfigError:
        return []
    sizes = [task.num_examples(client) for client in range(task.num_clients)]
    return plot_task(labels, sizes, rates, folder)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
