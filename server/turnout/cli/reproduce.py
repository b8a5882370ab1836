"""``turnout reproduce``: run a paper's small study and say which of its claims hold here."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose

if TYPE_CHECKING:
    from turnout.reproduce.report import StudyReport

Slug = Annotated[
    str, typer.Argument(metavar="SLUG", help="The study, named like its method: fedau, fedstale, ...")
]
Directory = Annotated[Path, typer.Option(help="Folder in which the study's directory is made.")]


def reproduce(
    slug: Slug,
    directory: Directory = Path("runs"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Run a paper's small study: its table, ours beside it, and each claim with whether it holds."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.cli.methods import load_everything
        from turnout.server.environment import describe_environment
        from turnout.server.run_directory import RunDirectory, directory_name, new_run_id
        from turnout.wire import find

        with output.working("Loading methods"):
            load_everything()
        entry = find("study", slug)
        report: StudyReport = _run(entry.target, slug, output)
        path = directory / directory_name(f"reproduce-{slug}", new_run_id(), datetime.now(UTC))
        study = RunDirectory.create(
            path,
            experiment={"study": {"slug": slug, "paper": entry.paper or ""}},
            environment=describe_environment(),
        )
        _keep(report, study)
        _print(report, output)
        output.say(f"\nPlots and numbers  {study.path}", markup=False, soft_wrap=True)
        output.data(report.to_json())


def _run(study: Any, slug: str, output: Output) -> StudyReport:
    """Run the study with its progress shown; ``progress(what, done, total)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bars: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=output.err, disable=not output.live) as shown:

        def progress(what: str, done: int, total: int) -> None:
            if not output.live:
                output.say(f"{slug}: {what} {done}/{total}", markup=False)
                return
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done, total=total)

        report: StudyReport = study(progress)
        return report


def _keep(report: StudyReport, study: Any) -> None:
    from turnout.server.documents import json_document, write_atomically

    tables = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in report.tables]
    write_atomically(study.path / "report.json", json_document({**report.to_json(), "tables": tables}))
    for name, plot in report.plots.items():
        plot(study.plots / name)


def _print(report: StudyReport, output: Output) -> None:
    from rich.markup import escape

    from turnout.cli.tables import result_table
    from turnout.cli.wording import claim_text

    for part in report.tables:
        table = result_table(escape(part.title))
        for index, column in enumerate(part.columns):
            table.add_column(escape(column), justify="left" if index == 0 else "right")
        for row in part.rows:
            table.add_row(*(escape(cell) for cell in row))
        output.show(table)
        output.show("")
    claims = result_table("What must be observed")
    for column in ("claim", "measured", "compared with", "holds"):
        claims.add_column(column, justify="left" if column == "claim" else "right")
    for claim in report.claims:
        verdict = "[green]yes[/]" if claim.holds else "[bold red]NO[/]"
        claims.add_row(escape(claim.claim), claim_text(claim.measured), claim_text(claim.baseline), verdict)
    output.show(claims)
    held = sum(claim.holds for claim in report.claims)
    output.say(f"{held} of {len(report.claims)} claims hold.")
