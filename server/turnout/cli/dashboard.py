"""``turnout dashboard``: the page over a run store."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from turnout.cli.output import NoColor, Output, Quiet, Verbose

if TYPE_CHECKING:
    from turnout.server.store import RunStore

Store = Annotated[
    str,
    typer.Option(envvar="TURNOUT_STORE", help="Run store: a directory, an SQLite file or a database URL."),
]
Host = Annotated[str, typer.Option(envvar="TURNOUT_DASHBOARD_HOST", help="Address to listen on.")]
Port = Annotated[
    int, typer.Option(min=0, max=65_535, envvar="TURNOUT_DASHBOARD_PORT", help="Port; 0 is any free one.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="TURNOUT_DASHBOARD_TOKEN_FILE",
        help="File (mode 0600) with the token that readers need.",
    ),
]
GenerateToken = Annotated[
    bool, typer.Option("--generate-token", help="Make a token for this time and print it.")
]
TlsCert = Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate (PEM): serve HTTPS.")]
TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Further host name that browsers ask for it by; may be repeated."),
]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")]

_CATALOGUE_SECONDS: Final = 120.0


def dashboard(
    store: Store = "runs",
    host: Host = "127.0.0.1",
    port: Port = 8050,
    token_file: TokenFile = None,
    generate_token: GenerateToken = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    allow_host: AllowHost = None,
    open_page: Open = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Show the runs of a store in the browser, live. It only reads; stopping it touches no run."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color) as output:
        from turnout.dashboard import Dashboard, DashboardOptions
        from turnout.dashboard.access import new_token, read_token
        from turnout.wire import ConfigError

        if token_file is not None and generate_token:
            raise ConfigError("--token-file and --generate-token: give one of them.")
        token = new_token() if generate_token else None if token_file is None else read_token(token_file)
        options = DashboardOptions(
            host=host,
            port=port,
            token=token,
            certificate=tls_cert,
            key=tls_key,
            hosts=tuple(allow_host or ()),
        )
        served = Dashboard(store, options, catalogue=method_catalogue)
        output.say(f"dashboard at {served.url}", markup=False, soft_wrap=True)
        if generate_token:
            output.warn(f"token: {token}")
        if not options.is_local and tls_cert is None:
            output.warn(
                "Plain HTTP beyond this machine: anyone on the way can read along, the token included."
            )
        output.say("Ctrl-C stops it.")
        if open_page:
            threading.Timer(0.5, webbrowser.open, (served.url,)).start()
        served.run()


@contextmanager
def beside_run(
    address: str | None, token_file: Path | None, output: Output
) -> Iterator[Callable[[RunStore], None]]:
    """Listen on ``address`` (if any); give what serves a run's store there, on a thread of its own.

    Whatever happens to the dashboard, the run goes on. Raises `ConfigError` before there is one.
    """
    if address is None:
        yield lambda store: None
        return
    from turnout.dashboard import Dashboard, DashboardOptions, listen
    from turnout.dashboard.access import read_token
    from turnout.wire import ConfigError, TurnoutError

    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"--dashboard {address!r}: write HOST:PORT, for example 127.0.0.1:8050.")
    token = None if token_file is None else read_token(token_file)
    options = DashboardOptions(host=host.strip("[]"), port=int(port), token=token)
    if token is None and not options.is_local:
        raise ConfigError(
            f"--dashboard {address} can be reached from other machines: give --dashboard-token-file FILE."
        )
    with ExitStack() as stack:
        listener = stack.enter_context(listen(options))

        def show(store: RunStore) -> None:
            location = store.url.render_as_string(hide_password=False)
            try:
                served = Dashboard(location, options, catalogue=method_catalogue, listener=listener)
            except TurnoutError as error:
                output.warn(f"no dashboard: {error}")
                return
            stack.enter_context(served)
            output.say(f"dashboard at {served.url}", markup=False)

        yield show


@cache
def method_catalogue() -> list[dict[str, Any]]:
    """Return what `turnout methods --json` prints; from a process of its own, as it loads PyTorch."""
    command = [sys.executable, "-m", "turnout.cli", "methods", "--json"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_CATALOGUE_SECONDS,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    return entries
