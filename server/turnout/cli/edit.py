"""``turnout edit``: make a finished run's model forget what it merely memorised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turnout.cli.output import REFUSED, TARGET_MISSED, Json, NoColor, Output, Quiet, Verbose

if TYPE_CHECKING:
    from turnout.experiment.edit import EditReport

Run = Annotated[
    str, typer.Argument(metavar="RUN", help='Id of a run (or how it starts), its directory, or "last".')
]
Rho = Annotated[
    str,
    typer.Option(
        metavar="RHO[,RHO...]",
        help="Share of a layer's curvature that is kept, 0 to 1; several to compare. Lower forgets more.",
    ),
]
Layers = Annotated[
    str,
    typer.Option(metavar="A,B,...", help="Layers to edit, by name. Default: all but the first and the last."),
]
Labels = Annotated[
    Literal["dataset", "sampled", "expected"],
    typer.Option(
        help="Labels for the gradients: the data's, the model's own draws, or the mean over all classes."
    ),
]
Weighting = Annotated[
    Literal["examples", "balanced"],
    typer.Option(help="Clients count by their examples, or alike: protects what only small clients have."),
]
Store = Annotated[str, typer.Option(help="Run store: a directory, an SQLite file or a database URL.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ask the run's real clients: wait here until all of them have connected (`turnout client`).",
    ),
]
Certs = Annotated[
    Path | None, typer.Option(metavar="DIR", help="With --address: certificates of `turnout certs`.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="With --address: plain text beyond this machine.")]


def edit(
    run: Run = "last",
    rho: Rho = "0.95",
    layers: Layers = "",
    labels: Labels = "dataset",
    weighting: Weighting = "examples",
    store: Store = "runs",
    address: Address = None,
    certs: Certs = None,
    insecure: Insecure = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Edit a finished run's model by loss curvature: less memorised, nothing trained (arXiv 2510.24256).

    Clients send statistics of the layers, the server edits; the run's own model stays as it is.
    """
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.experiment.edit import EditOptions, edit_run
        from turnout.experiment.recorded import find_run
        from turnout.experiment.serve import AddressError, Deployment
        from turnout.server.store import RunStore
        from turnout.wire import ConfigError

        try:
            shares = tuple(float(word) for word in rho.split(","))
        except ValueError:
            raise ConfigError(
                f"--rho {rho}: write numbers from 0 to 1, for example --rho 0.99,0.95."
            ) from None
        names = tuple(name.strip() for name in layers.split(",") if name.strip())
        if address is None and (certs is not None or insecure):
            raise ConfigError("--certs and --insecure are about real clients; give --address as well.")
        deployment = None if address is None else Deployment(address=address, certs=certs, insecure=insecure)
        options = EditOptions(rho=shares, layers=names, labels=labels, weighting=weighting)
        with RunStore(store, create=False) as opened:
            row = find_run(opened, run)
            directory = opened.directory_of(row)
        try:
            report = edit_run(
                row,
                directory,
                options,
                deployment=deployment,
                waiting=lambda where: output.say(
                    f"waiting at {where} for {row.num_clients} clients", markup=False, soft_wrap=True
                ),
            )
        except AddressError as error:
            raise output.failure(error, REFUSED) from error
        _show(report, output)
        output.data(report.document())
        if report.missing and len(report.missing) == row.num_clients:
            raise typer.Exit(TARGET_MISSED)


def _show(report: EditReport, output: Output) -> None:
    from turnout.cli.tables import result_table
    from turnout.cli.wording import metric_text
    from turnout.experiment.edit import layer_table

    models = [("before", report.before), *((f"rho {e.rho:g}", e.judged) for e in report.edited)]
    table = result_table(f"run {report.run_id}: curvature of {report.examples} examples")
    table.add_column("")
    for heading, _ in models:
        table.add_column(heading, justify="right")
    for name in report.before.metrics:
        table.add_row(name, *(metric_text(name, judged.metrics[name]) for _, judged in models))
    for word, pick in (("worst client", min), ("mean of clients", _mean)):
        if all(judged.clients for _, judged in models):
            cells = [metric_text("accuracy", pick(judged.clients.values())) for _, judged in models]
            table.add_row(f"{word}, own data", *cells)
    output.show(table)
    kept = result_table("What is left of each layer")
    for column in ("rho", "layer", "components", "squared norm"):
        kept.add_column(column, justify="left" if column == "layer" else "right")
    for row in layer_table(report.edited):
        kept.add_row(*row)
    output.show(kept)
    for client, reason in report.missing.items():
        output.warn(f"client {client} is not in the statistics: {reason.strip().splitlines()[-1]}")
    for model in report.edited:
        output.say(f"Model        {model.path}", markup=False, soft_wrap=True)


def _mean(values: object) -> float:
    numbers = list(values)  # type: ignore[call-overload]
    return float(sum(numbers) / len(numbers))
