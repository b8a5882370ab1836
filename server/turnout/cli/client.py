"""``turnout client``: work for a server, as one client or as many."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from turnout.cli.metrics import MetricsAddress, MetricsOpen, MetricsOptions, MetricsPort, metrics_endpoint
from turnout.cli.output import DONE, INTERRUPTED, REFUSED, Json, NoColor, Output, Quiet, Verbose

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from turnout.client.node import ClientTls, NodeSummary, NodeWatch
    from turnout.wire.metrics_registry import MetricsRegistry

Server = Annotated[
    str, typer.Option(metavar="HOST:PORT", envvar="TURNOUT_SERVER", help="Where the server listens.")
]
File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="The experiment, if not the one that the server sends."),
]
App = Annotated[
    str | None,
    typer.Option(metavar="MODULE:ATTRIBUTE", help="A Flower ClientApp of your own, found from here."),
]
Clients = Annotated[
    str | None,
    typer.Option(
        metavar="0-49,60",
        envvar="TURNOUT_CLIENTS",
        help="The clients of the experiment that this node works for; left out, the server gives it one.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        envvar="TURNOUT_NAME",
        help="The node's name, the same whenever it comes back; with --certs, its certificate's.",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="TURNOUT_STATE_DIR",
        help="Where clients' states outlive this process; without it they live in memory.",
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Clients that train at the same time.")]
MaxRounds = Annotated[int | None, typer.Option(min=1, help="Leave after this many accepted rounds.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(envvar="TURNOUT_DEVICE", help="Where to train; auto takes a GPU where there is one."),
]
Tag = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="KEY=VALUE", help="Tell the server, which can choose by it. Repeatable."),
]
Certs = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", envvar="TURNOUT_CERTS", help="Has ca.pem, NAME.pem and NAME.key: TLS both ways."
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", envvar="TURNOUT_INSECURE", help="Plain text to another machine."),
]
ConnectTimeout = Annotated[
    float,
    typer.Option(
        min=0.1, metavar="SECONDS", help="Give up when no server takes this node in this time at the start."
    ),
]

_NAME_CHARACTERS: Final = 64


def client(
    server: Server,
    file: File = None,
    app: App = None,
    clients: Clients = None,
    name: Name = None,
    state_dir: StateDir = None,
    workers: Workers = 1,
    max_rounds: MaxRounds = None,
    device: Device = "auto",
    tag: Tag = None,
    certs: Certs = None,
    insecure: Insecure = False,
    connect_timeout: ConnectTimeout = 60.0,
    metrics_address: MetricsAddress = None,
    metrics_port: MetricsPort = None,
    metrics_open: MetricsOpen = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Work for a server until its run is over; come back whenever the connection is lost.

    SIGTERM finishes what is under way, hands back the rest and exits with 0.
    """
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.client.node import NodeRefused, NodeUnreachable, parse_clients, run_node
        from turnout.wire import ConfigError

        partitions = None if clients is None else parse_clients(clients)
        tags = _tags(tag or [])
        called = name or _default_name(partitions)
        tls = None if certs is None else _tls(certs, called, named=name is not None)
        _check_server(server, secured=certs is not None or insecure)
        with output.working("Preparing"):
            chosen, examples, described = _choose(app, file, None if device == "auto" else device)
        place = f" on {described}" if described else ""
        output.say(f"node {called}: client {clients or 'of any number'} for {server}{place}", markup=False)
        metrics = MetricsOptions(metrics_address, metrics_port, metrics_open)
        try:
            with _metrics(metrics, tls, output) as watch:
                summary = run_node(
                    server,
                    chosen,
                    partitions,
                    name=called,
                    state_dir=state_dir,
                    tls=tls,
                    workers=workers,
                    max_rounds=max_rounds,
                    device=described,
                    tags=tags,
                    examples=examples,
                    insecure=insecure,
                    connect_timeout=connect_timeout,
                    watch=watch,
                )
        except (NodeRefused, NodeUnreachable) as error:
            raise output.failure(error, REFUSED) from error
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):  # An address that is in use.
                raise output.failure(error, REFUSED) from error
            raise
        _conclude(summary, output)


@contextmanager
def _metrics(options: MetricsOptions, tls: ClientTls | None, output: Output) -> Iterator[NodeWatch]:
    """Serve the node's metrics, if asked to; give what it must tell."""
    from turnout.client.node import NodeWatch

    with metrics_endpoint(options, output) as registry:
        yield NodeWatch() if registry is None else _watch(registry, tls)


def _watch(registry: MetricsRegistry, tls: ClientTls | None) -> NodeWatch:
    from turnout.client.node.metrics import NodeMetrics
    from turnout.wire.metrics_certificates import watch_certificates

    if tls is not None and tls.certificate is not None:
        watch_certificates(registry, {"ca": Path(tls.ca), "node": Path(tls.certificate)})
    return NodeMetrics(registry)


def _conclude(summary: NodeSummary, output: Output) -> None:
    output.data(
        {
            "rounds": summary.rounds,
            "replies": summary.replies,
            "sessions": summary.sessions,
            "reason": summary.reason,
        }
    )
    output.show(f"{summary.rounds} rounds, {summary.replies} replies: {summary.reason}")
    code = INTERRUPTED if summary.reason == "SIGINT" else DONE
    if summary.unfinished:
        # Handed back, so nobody waits for it; the interpreter would wait for its thread to end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise typer.Exit(code)


def _choose(
    app: str | None, file: Path | None, device: str | None
) -> tuple[ClientApp, Callable[[int, Mapping[str, Any]], int] | None, str]:
    """Return the app, what says how many examples a client has (None: nothing), and the device in words."""
    from turnout.wire import ConfigError

    if app is not None and file is not None:
        raise ConfigError(f"--app {app} and {file} both say what clients do; give one of them.")
    if app is not None:
        from turnout.experiment.own_app import load_app

        return load_app(app), None, device or ""  # What the app uses is its own affair.
    # Here and not at the first message, so that the server hears of the right device.
    described = _describe(device)
    if file is None:
        from turnout.experiment.served_app import ServedApp

        served = ServedApp(device)
        return served, served.num_examples, described
    from turnout.experiment import load_experiment
    from turnout.experiment.build import EXTERNAL, make_app, make_task

    experiment = load_experiment(file)
    if experiment.task.name == EXTERNAL:
        raise ConfigError(f"{file}: task.name = {EXTERNAL!r} brings no app; give --app MODULE:ATTRIBUTE.")
    task = make_task(experiment)
    return make_app(experiment, task, device=device), lambda c, _: task.num_examples(c), described


def _describe(device: str | None) -> str:
    """Return the device that is used, in words. Raises `ConfigError` when it is not there."""
    from turnout.wire import ConfigError
    from turnout.wire.uncollected import uncollected

    with uncollected():
        import torch

    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda, but no CUDA device is present; use auto or cpu.")
    return f"cuda:{torch.cuda.get_device_name()}"


def _tags(written: list[str]) -> dict[str, str]:
    from turnout.wire import ConfigError

    tags = {}
    for text in written:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--tag {text!r}: write KEY=VALUE, for example --tag site=north.")
        tags[key] = value
    return tags


def _default_name(partitions: list[int] | None) -> str:
    """Return the host's name, with the clients it works for: a machine may run several nodes."""
    host = socket.gethostname().split(".")[0] or "node"
    if partitions is None:
        return host
    numbers = f"{partitions[0]}-{partitions[-1]}" if len(partitions) > 1 else str(partitions[0])
    return f"{host[: _NAME_CHARACTERS - len(numbers) - 1]}-{numbers}"


def _check_server(server: str, *, secured: bool) -> None:
    from turnout.wire import ConfigError
    from turnout.wire.address import is_loopback

    if server.startswith("unix:"):
        return
    host, colon, port = server.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(f"--server {server}: write HOST:PORT, for example --server 127.0.0.1:9091.")
    if not (secured or is_loopback(server)):
        raise ConfigError(
            f"--server {server} is another machine: give certificates (--certs DIR, see turnout certs), or "
            "say --insecure to send models in plain text."
        )


def _tls(certs: Path, name: str, *, named: bool) -> ClientTls:
    from turnout.client.node import ClientTls
    from turnout.wire import ConfigError

    if not named:
        raise ConfigError(f"--certs {certs} needs --name NAME: the name that the certificate was made for.")
    for file in ("ca.pem", f"{name}.pem", f"{name}.key"):
        if not (certs / file).is_file():
            raise ConfigError(
                f"--certs {certs} has no {file}; get one with turnout enrol, or make it where the authority "
                f"is: turnout certs client {name} --dir DIR"
            )
    return ClientTls(certs / "ca.pem", certs / f"{name}.pem", certs / f"{name}.key")
