"""``turnout methods``: everything an experiment can name."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose

Kind = Annotated[str | None, typer.Option(help="Only one kind: strategy, task, participation, ...")]


def methods(
    kind: Kind = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """List every strategy, task, participation model and other method, with its paper."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.cli.tables import result_table
        from turnout.wire import methods as registered
        from turnout.wire import unknown_name

        with output.working("Loading methods"):
            load_everything()
        entries = registered(kind)
        if kind is not None and not entries:
            raise unknown_name("kind", kind, {entry.kind for entry in registered()})
        output.data(
            [
                {"slug": e.slug, "kind": e.kind, "paper": e.paper, "class": e.class_path}
                | {"summary": e.summary}
                for e in entries
            ]
        )
        table = result_table()
        for column in ("kind", "name", "paper (arXiv)", "what it is"):
            table.add_column(column, no_wrap=column != "what it is")
        previous = ""
        for entry in entries:
            if previous not in ("", entry.kind):
                table.add_section()
            table.add_row(
                entry.kind if entry.kind != previous else "",
                entry.slug,
                entry.paper or "",
                entry.summary.replace("``", ""),
            )
            previous = entry.kind
        output.show(table)
        output.say(
            "In an experiment file [strategy], [task], [participation] and [link] name theirs,\n"
            "[peft] an adapter, [client] an optimizer, [task] also a partition. Studies: turnout reproduce",
            markup=False,
        )


def load_everything() -> None:
    """Import all packages that register methods, the studies included."""
    from turnout.experiment.methods import load_methods

    load_methods()
    importlib.import_module("turnout.reproduce")
