"""``turnout simulate``: run an experiment in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turnout.cli.output import TARGET_MISSED, Json, NoColor, Output, Quiet, Verbose
from turnout.cli.tracking import LogTo, tracking

if TYPE_CHECKING:
    from turnout.experiment import Experiment
    from turnout.experiment.recorded import RunSummary
    from turnout.server.recorder import RunRecorder
    from turnout.server.store import RunStore
    from turnout.server.trackers import TrackingCallback

File = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="The experiment, a TOML file. Not needed with --resume.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: --set strategy.beta=0.3. Repeatable."),
]
Compare = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Run several strategies on the same data, seed and participation, and compare them.",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="RUN", help='Go on with a run: its id, its directory, or "last".'),
]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw no plots at the end.")]


def simulate(
    file: File = None,
    overrides: Set = None,
    compare: Compare = None,
    resume: Resume = None,
    no_plots: NoPlots = False,
    log_to: LogTo = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Run an experiment in this process: clients come and go as its participation model says."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        with output.working("Reading the experiment"):
            experiment = _experiment(file, overrides or [], resume)
        with tracking(log_to, output) as trackers:
            if compare is not None:
                from turnout.cli.compare import run_comparison

                reached = run_comparison(
                    experiment,
                    compare,
                    output,
                    file=file,
                    study=resume,
                    plots=not no_plots,
                    trackers=trackers,
                )
            else:
                reached = _run(
                    experiment, output, file=file, resume=resume, plots=not no_plots, trackers=trackers
                )
        if not reached:
            raise typer.Exit(TARGET_MISSED)


def _experiment(file: Path | None, overrides: list[str], resume: str | None) -> Experiment:
    from turnout.experiment import load_experiment
    from turnout.experiment.recorded import find_run
    from turnout.server.store import RunStore
    from turnout.wire import ConfigError

    if file is not None:
        return load_experiment(file, overrides)
    if resume is None:
        raise ConfigError(
            "no experiment given: name a file, for example turnout simulate examples/digits.toml."
        )
    directory = Path(resume)
    if not (directory / "experiment.toml").is_file():
        with RunStore("runs", create=False) as store:
            directory = store.directory_of(find_run(store, resume))
    return load_experiment(directory / "experiment.toml", overrides)


def _run(
    experiment: Experiment,
    output: Output,
    *,
    file: Path | None,
    resume: str | None,
    plots: bool,
    trackers: TrackingCallback,
) -> bool:
    """Run one experiment, show its table, and return whether its target (if it has one) was reached."""
    from turnout.cli.progress import RunProgress
    from turnout.experiment.recorded import open_store
    from turnout.simulation.run import simulate

    with RunProgress(output, [experiment.label]) as progress:

        def started(recorder: RunRecorder) -> None:
            run = recorder.run
            output.about["run"] = run.id
            trackers.begin(run, recorder.directory.path)
            progress.begin(experiment.label, num_clients=run.num_clients)
            output.resume_hint = f"Continue with: turnout simulate {file or ''} --resume {run.id}".replace(
                "  ", " "
            )
            again = (
                f"continues after round {recorder.last_round}"
                if recorder.last_round
                else f"{run.num_rounds} rounds"
            )
            output.say(
                f"run {run.id}: {experiment.label} on {run.task}, {run.num_clients} clients, {again}",
                markup=False,
            )
            output.say(f"executor: {recorder.executor}", markup=False)

        summary = simulate(
            experiment, resume=resume, callbacks=[trackers, progress], started=started, plots=plots
        )
    output.resume_hint = ""
    with open_store(experiment) as store:
        return finish_run(experiment, store, summary, output, file=file, plots=plots)


def finish_run(
    experiment: Experiment,
    store: RunStore,
    summary: RunSummary,
    output: Output,
    *,
    file: Path | None,
    plots: bool,
) -> bool:
    """Show the table of a run that is over; return whether its target (if it has one) was reached."""
    from turnout.cli.tables import Score, run_table
    from turnout.server.history import RunHistory

    history = RunHistory.load(store, store.run(summary.run_id), experiment.label)
    title = f"{experiment.label} on {experiment.task.name}: {summary.rounds} rounds"
    output.show(run_table(history, title=title, seconds=summary.seconds, metrics=summary.metrics))
    _next_steps(experiment, summary, output, file, plots)
    output.data(summary.document())
    if len(history.outcome) and not history.participants.any():
        output.warn(
            "no client gave a reply that could be used: the model is the one that the run began with; "
            f"turnout runs show {summary.run_id} says why"
        )
    score = Score.of(history)
    target = experiment.run.target_accuracy
    if target is None or (score is not None and score.metric == "accuracy" and score.best >= target):
        return True
    output.warn(f"target_accuracy = {target:g} was not reached")
    return False


def _next_steps(
    experiment: Experiment, summary: RunSummary, output: Output, file: Path | None, plots: bool
) -> None:
    output.say()
    if plots:
        output.say(f"Plots        {summary.directory / 'plots'}", markup=False, soft_wrap=True)
    output.say(
        f"Model        {summary.directory / 'model' / 'model.safetensors'}", markup=False, soft_wrap=True
    )
    if experiment.task.name != "external":  # Which few strategies can do with.
        _suggest_comparison(experiment, summary, output, file)
    output.say(f"Look closer  turnout runs show {summary.run_id}", markup=False)


def _suggest_comparison(
    experiment: Experiment, summary: RunSummary, output: Output, file: Path | None
) -> None:
    others = [name for name in ("fedavg", "fedau", "fedstale") if name != experiment.strategy.name]
    compared = ",".join([experiment.strategy.name, *others])
    name = file or summary.directory / "experiment.toml"
    output.say(f"Compare      turnout simulate {name} --compare {compared}", markup=False, soft_wrap=True)
