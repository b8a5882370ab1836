"""``turnout simulate --compare``: several strategies on the same data, seed and participation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turnout.cli.output import Output
from turnout.cli.progress import RunProgress
from turnout.cli.tables import comparison_rows, comparison_table, participation_rows, verdict
from turnout.experiment import Experiment
from turnout.experiment.build import Federation, build
from turnout.experiment.recorded import RunSummary, open_store, plot_clients
from turnout.server.documents import json_document, write_atomically
from turnout.server.environment import describe_environment
from turnout.server.errors import StoreError
from turnout.server.history import RunHistory
from turnout.server.recorder import RunRecorder
from turnout.server.run_directory import RunDirectory, directory_name, new_run_id
from turnout.server.run_plots import plot_comparison
from turnout.server.store import RunStore
from turnout.server.trackers import TrackingCallback
from turnout.simulation.run import simulate
from turnout.wire import ConfigError


def run_comparison(
    experiment: Experiment,
    names: str,
    output: Output,
    *,
    file: Path | None,
    study: str | None,
    plots: bool,
    trackers: TrackingCallback,
) -> bool:
    """Run every strategy of ``names`` (separated by commas) and show one table.

    ``study`` continues a comparison that was interrupted. Returns whether any run reached the target accuracy
    (True without one).
    """
    labels = _labels(names)
    variants = [experiment.variant(label) for label in labels]
    with output.working("Preparing data and clients"):
        first = build(variants[0])
        for variant in variants[1:]:
            build(variant, task=first.task)  # Every impossible value is found before the first round is run.
    with open_store(experiment) as store:
        directory, study_id = _study_directory(experiment, labels, store, study)
        command = (
            f"turnout simulate {file or directory.experiment_file} --compare {names} --resume {study_id}"
        )
        output.resume_hint = f"Continue with: {command}"
        output.say(
            f"study {study_id}: {len(labels)} strategies on {experiment.task.name}, "
            f"{first.task.num_clients} clients, {experiment.run.rounds} rounds each",
            markup=False,
        )
        summaries = _run_all(variants, store, study_id, first, output, trackers)
        output.resume_hint = ""
        histories = [
            RunHistory.load(store, store.run(summary.run_id), label)
            for label, summary in zip(labels, summaries, strict=True)
        ]
    return _conclude(experiment, directory, summaries, histories, output, first, plots)


def _run_all(
    variants: Sequence[Experiment],
    store: RunStore,
    study_id: str,
    federation: Federation,
    output: Output,
    trackers: TrackingCallback,
) -> list[RunSummary]:
    earlier = {run.strategy: run.id for run in store.runs(study=study_id)}
    summaries: list[RunSummary] = []
    with RunProgress(output, [variant.label for variant in variants]) as progress:
        for variant in variants:

            def started(recorder: RunRecorder, variant: Experiment = variant) -> None:
                progress.begin(variant.label, num_clients=recorder.run.num_clients)
                if not summaries:
                    output.say(f"executor: {recorder.executor}", markup=False)
                trackers.begin(recorder.run, recorder.directory.path)

            summary = simulate(
                variant,
                resume=earlier.get(variant.label),
                callbacks=[trackers, progress],
                started=started,
                study=study_id,
                task=federation.task,
                plots=False,
            )
            summaries.append(summary)
            output.data({"strategy": variant.label, **summary.document()})
    return summaries


def _conclude(
    experiment: Experiment,
    directory: RunDirectory,
    summaries: Sequence[RunSummary],
    histories: Sequence[RunHistory],
    output: Output,
    federation: Federation,
    plots: bool,
) -> bool:
    target = experiment.run.target_accuracy
    seconds = [summary.seconds for summary in summaries]
    metric, reference, rows = comparison_rows(histories, seconds=seconds, target=target)
    documents: list[dict[str, Any]] = [
        {**row, **summary.document()} for row, summary in zip(rows, summaries, strict=True)
    ]
    write_atomically(directory.path / "comparison.json", json_document(documents))
    if plots:
        with output.working("Drawing plots"):
            plot_comparison(histories, directory.plots, title=experiment.task.name)
            plot_clients(federation.task, federation.participation.rates, directory.plots)
    title = f"{experiment.task.name}: {federation.task.num_clients} clients, {experiment.run.rounds} rounds"
    output.show(comparison_table(metric, reference, rows, title=title))
    for line in _explanation(metric, rows, histories):
        output.say(line, markup=False)
    output.say()
    if plots:
        output.say(f"Plots        {directory.plots}", markup=False, soft_wrap=True)
    output.say(f"Numbers      {directory.path / 'comparison.json'}", markup=False, soft_wrap=True)
    output.say(f"Look closer  turnout runs show {summaries[-1].run_id}", markup=False)
    output.data(documents)
    return target is None or any(row["rounds-to-target"] is not None for row in rows)


def _explanation(metric: str, rows: Sequence[dict[str, Any]], histories: Sequence[RunHistory]) -> list[str]:
    presence = dict(participation_rows(histories[0])).get("presence")
    lines = [verdict(metric, rows)]
    if presence:
        lines.append(f"Clients came to {presence}: a plain average leans to those that come often.")
    if any(math.isfinite(row["weight-gini"]) for row in rows):
        lines.append(
            "Weight skew: 0 when every client counted the same over the run, 1 when one decided alone."
        )
    return [line for line in lines if line]


def _labels(names: str) -> list[str]:
    labels = [name.strip() for name in names.split(",") if name.strip()]
    doubled = sorted({name for name in labels if labels.count(name) > 1})
    if not labels or doubled:
        problem = f"names {', '.join(doubled)} twice" if doubled else "names no strategy"
        raise ConfigError(
            f"--compare {names!r} {problem}; write for example --compare fedavg,fedstale. To compare "
            'settings of a strategy, name them: [strategies.mild] with name = "fedstale" and beta = 0.2.'
        )
    return labels


def _study_directory(
    experiment: Experiment, labels: Sequence[str], store: RunStore, study: str | None
) -> tuple[RunDirectory, str]:
    """Return the directory of a new study, or that of ``study``, and its id."""
    parent = Path(experiment.run.directory)
    if study is not None:
        study_id = Path(study).name.rpartition("-")[2]
        if study_id == "last":
            study_id = next((run.study for run in store.runs() if run.study), "last")
        found = sorted(parent.glob(f"*-study-{study_id}"))
        if not found:
            raise StoreError(
                f"study {study_id!r} is not in {parent}; `turnout runs list` shows the runs and studies."
            )
        return RunDirectory(found[-1]), study_id
    study_id = new_run_id()
    table = experiment.resolved()
    settings = {label: experiment.strategies[label] for label in labels if label in experiment.strategies}
    if settings:
        table["strategies"] = settings
    path = parent / directory_name(f"{experiment.run.name}-study", study_id, datetime.now(UTC))
    return RunDirectory.create(path, experiment=table, environment=describe_environment()), study_id
