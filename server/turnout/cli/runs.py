"""``turnout runs``: what the run store holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose

if TYPE_CHECKING:
    from turnout.server.schema import ClientRoundRow, RunRow
    from turnout.server.store import RunStore

_WIDE: Final = 110  # Columns of text that all of the list fits into.

app = typer.Typer(no_args_is_help=True, help="List, show, plot and export recorded runs.")

Store = Annotated[str, typer.Option(help="Run store: a directory, an SQLite file or a database URL.")]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help='Id of a run (or how it starts), its directory, or "last".')
]
Limit = Annotated[int, typer.Option(min=1, help="Show at most this many runs, newest first.")]
What = Annotated[
    Literal["rounds", "clients"], typer.Option("--what", help="One line per round, or per client and round.")
]
Format = Annotated[Literal["csv", "json"], typer.Option("--format", help="csv or json.")]
To = Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout when left out.")]


@app.command("list")
def list_runs(
    store: Store = "runs",
    limit: Limit = 50,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """List the runs, newest first."""
    with (
        Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output,
        _open(store) as opened,
    ):
        from turnout.cli.tables import result_table
        from turnout.cli.wording import age_text, metric_text

        runs = opened.runs(limit=limit)
        rows = [_document(opened, run) for run in runs]
        output.data(rows)
        columns = ["id", "name", "strategy", "task", "status", "rounds", "result", "study", "started"]
        if output.out.width < _WIDE:
            columns = [column for column in columns if column not in ("name", "task", "study")]
        table = result_table()
        for column in columns:
            table.add_column(
                column,
                justify="right" if column == "rounds" else "left",
                no_wrap=column != "name",
                overflow="fold",
                min_width=8 if column == "id" else None,
            )
        for run, row in zip(runs, rows, strict=True):
            name = "accuracy" if "accuracy" in row["metrics"] else next(iter(row["metrics"]), None)
            cells = {
                "id": run.id,
                "name": run.name,
                "strategy": run.strategy,
                "task": run.task,
                "status": _coloured(row["status"]),
                "rounds": f"{row['rounds']}/{run.num_rounds}",
                "result": f"{name} {metric_text(name, row['metrics'][name])}" if name else "",
                "study": run.study or "",
                "started": age_text(run.created_at),
            }
            table.add_row(*(cells[column] for column in columns))
        output.show(table)
        if not rows:
            output.say("No run yet. Start one: turnout simulate FILE")


@app.command("show")
def show_run(
    run: Run = "last",
    store: Store = "runs",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Show one run: how it did, who took part, what failed, what it was told."""
    with (
        Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output,
        _open(store) as opened,
    ):
        from rich.syntax import Syntax

        from turnout.cli.tables import run_table
        from turnout.experiment.recorded import find_run
        from turnout.server.history import RunHistory

        row = find_run(opened, run)
        document = _document(opened, row) | {"config": row.config, "error": row.error}
        output.data(document)
        if as_json:
            return
        history = RunHistory.load(opened, row)
        done = f"{document['rounds']} of {row.num_rounds} rounds, {document['status']}"
        title = f"run {row.id}: {row.strategy} on {row.task}, {done}"
        output.show(run_table(history, title=title, seconds=row.seconds, metrics=document["metrics"]))
        if row.error:
            output.warn(row.error)
        _show_failures(opened.client_rounds(row.id), output)
        directory = opened.directory_of(row)
        output.say(f"\nDirectory    {directory}", markup=False, soft_wrap=True)
        if document["status"] in ("interrupted", "failed", "lost"):
            output.say(f"Go on        turnout simulate --resume {directory}", markup=False, soft_wrap=True)
        if verbose:
            output.show(
                Syntax((directory / "experiment.toml").read_text(), "toml", background_color="default")
            )


@app.command("plot")
def plot(
    run: Run = "last",
    store: Store = "runs",
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Draw a run's plots again, from what is committed; also of a run that was interrupted."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color) as output, _open(store) as opened:
        from turnout.experiment.recorded import find_run
        from turnout.server.run_directory import RunDirectory
        from turnout.server.run_plots import plot_run

        row = find_run(opened, run)
        for path in plot_run(opened, row, RunDirectory(opened.directory_of(row)).plots):
            output.out.print(str(path), markup=False, soft_wrap=True)


@app.command("export")
def export(
    run: Run = "last",
    what: What = "rounds",
    format_: Format = "csv",
    to: To = None,
    store: Store = "runs",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Export a run as CSV or JSON: its rounds with all metrics, or what each client did."""
    with (
        Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output,
        _open(store) as opened,
    ):
        from turnout.experiment.recorded import find_run
        from turnout.server.documents import json_document, write_atomically
        from turnout.server.export import client_documents, csv_text
        from turnout.server.history import metrics_lines

        row = find_run(opened, run)
        documents = (
            client_documents(opened.client_rounds(row.id))
            if what == "clients"
            else [_flattened(line) for line in metrics_lines(opened, row.id)]
        )
        if as_json or format_ == "json":
            text = json_document(documents)
        else:
            columns = list(dict.fromkeys(key for document in documents for key in document))
            text = csv_text(documents, columns)
        if to is None:
            typer.echo(text, nl=False)
        else:
            write_atomically(to, text)
            output.say(f"wrote {to}", markup=False)


def _open(store: str) -> RunStore:
    from turnout.server.store import RunStore

    return RunStore(store, create=False)


def _document(store: RunStore, run: RunRow) -> dict[str, Any]:
    done = store.rounds_done([run.id]).get(run.id, 0)
    return {
        "run_id": run.id,
        "name": run.name,
        "strategy": run.strategy,
        "task": run.task,
        "status": _status(store, run),
        "study": run.study,
        "seed": run.seed,
        "rounds": done,
        "num-rounds": run.num_rounds,
        "num-clients": run.num_clients,
        "metrics": store.latest_metrics(run.id),
        "seconds": round(run.seconds, 3),
        "model_sha256": run.model_sha256,
        "directory": str(store.directory_of(run)),
        "created": run.created_at.isoformat(),
    }


def _status(store: RunStore, run: RunRow) -> str:
    """Return the run's status; one that is said to run although no process holds its directory is lost."""
    from turnout.server.errors import RunDirectoryError
    from turnout.server.run_directory import RunDirectory

    if run.status != "running":
        return run.status
    try:
        return "running" if RunDirectory(store.directory_of(run)).in_use() else "lost"
    except (OSError, RunDirectoryError):
        return "lost"


def _coloured(status: str) -> str:
    colours = {
        "finished": "green",
        "running": "cyan",
        "failed": "red",
        "lost": "red",
        "interrupted": "yellow",
    }
    return f"[{colours.get(status, 'white')}]{status}[/]"


def _show_failures(rows: list[ClientRoundRow], output: Output) -> None:
    """Show each distinct reason once, with how often it came and one client's whole account."""
    by_reason: dict[str, list[ClientRoundRow]] = {}
    for row in rows:
        if row.reason:
            by_reason.setdefault(row.reason.strip().splitlines()[-1], []).append(row)
    for reason, found in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        first = found[0]
        output.out.print(
            f"\n{len(found)} x {first.outcome}: {reason} (first: client {first.client}, round {first.round})",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        if output.verbose and first.reason:
            output.out.print(first.reason, markup=False, soft_wrap=True)


def _flattened(line: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": number for name, number in value.items()}
        else:
            flat[key] = value
    return flat
