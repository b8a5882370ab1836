"""The ``turnout`` command. Commands import what they need when they run: ``--help`` answers at once."""

from __future__ import annotations

from typing import Final

import typer

from turnout.cli.certs import app as certs
from turnout.cli.client import client
from turnout.cli.dashboard import dashboard
from turnout.cli.data import app as data
from turnout.cli.edit import edit
from turnout.cli.enrol import enrol
from turnout.cli.examples import shown
from turnout.cli.export import export
from turnout.cli.methods import methods
from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose
from turnout.cli.reproduce import reproduce
from turnout.cli.runs import app as runs
from turnout.cli.server import server
from turnout.cli.simulate import simulate

app = typer.Typer(
    name="turnout",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning where clients come and go.",
    suggest_commands=False,  # click suggests them.
    epilog="To begin: turnout simulate examples/digits.toml\n\n"
    "Exit codes: 0 done, 1 failed, 2 bad usage or experiment, 3 refused or unreachable, "
    "4 target not reached, 130 interrupted.",
)

_RUN: Final = "Run"
_LOOK: Final = "Look at runs, use what came out"
_KNOW: Final = "What there is"
_OPERATE: Final = "Certificates"

for function, panel in (
    (simulate, _RUN),
    (server, _RUN),
    (client, _RUN),
    (dashboard, _LOOK),
    (export, _LOOK),
    (edit, _LOOK),
    (methods, _KNOW),
    (reproduce, _KNOW),
    (enrol, _OPERATE),
):
    app.command(rich_help_panel=panel, epilog=shown(function.__name__))(function)
app.add_typer(runs, name="runs", rich_help_panel=_LOOK)
app.add_typer(data, name="data", rich_help_panel=_KNOW)
app.add_typer(certs, name="certs", rich_help_panel=_OPERATE)


@app.command(rich_help_panel=_KNOW)
def version(
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, no_color: NoColor = False
) -> None:
    """Print the versions of Turnout and of what it stands on."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.server.environment import package_version

        versions = {name: package_version(name) for name in ("turnout", "flwr", "torch", "numpy")}
        output.data(versions)
        for name, number in versions.items():
            output.show(f"{name} {number or 'not installed'}")


def main() -> None:
    """Run the command line."""
    app()
