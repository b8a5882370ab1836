"""``turnout export``: a run's model or adapter, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose
from turnout.cli.runs import Run, Store

Merged = Annotated[
    bool,
    typer.Option(
        "--merged/--adapter",
        help="The whole model, adapters merged into its weights; or the adapter alone, as Hugging Face peft "
        "saves it.",
    ),
]
To = Annotated[Path, typer.Option("--to", help="Folder to write, new or empty.")]


def export(
    run: Run = "last",
    merged: Merged = True,
    to: To = Path("exported"),
    store: Store = "runs",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Write the model that a run learned, or its adapter, as safetensors in the form of Hugging Face."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.experiment.export import export_run
        from turnout.experiment.recorded import find_run
        from turnout.server.store import RunStore

        with RunStore(store, create=False) as opened:
            row = find_run(opened, run)
            with output.working("Making the model again"):
                folder = export_run(opened, row, to, merged=merged)
        files = sorted(path.name for path in folder.iterdir())
        output.data({"run_id": row.id, "merged": merged, "directory": str(folder), "files": files})
        output.say(f"wrote {folder}: {', '.join(files)}", markup=False, soft_wrap=True)
