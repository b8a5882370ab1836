"""``turnout certs token|revoke`` and ``turnout enrol``: how nodes come to certificates, and lose them."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from turnout.cli.output import REFUSED, Json, NoColor, Output, Quiet, Verbose

Authority = Annotated[
    Path, typer.Option("--dir", metavar="DIR", help="Where turnout certs init put the authority.")
]
NodeName = Annotated[
    str, typer.Argument(metavar="NAME", help="The node's name, which its certificate bears.")
]
TokenFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help='Holds what turnout certs token printed; "-" reads stdin. A token on the command line would be '
        "seen by every user of the machine.",
    ),
]

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_OTHERS: Final = 0o077


def token(
    name: NodeName,
    directory: Authority,
    ttl: Annotated[
        str, typer.Option(metavar="TIME", help="How long it can be used: 90s, 30m, 1h, 2d.")
    ] = "1h",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Print a token with which NAME can fetch a certificate, once, with a key of its own."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.server.fleet.certs import check_name
        from turnout.server.fleet.tokens import TokenBook
        from turnout.wire import ConfigError

        check_name(name)
        if not (directory / "ca.pem").exists():
            raise ConfigError(
                f"--dir {directory} holds no authority; run turnout certs init {directory} first."
            )
        secret = TokenBook(directory).issue(name, seconds(ttl))
        output.data({"name": name, "token": secret, "ttl": ttl})
        if not as_json:
            print(secret, flush=True)  # Plain, so that it survives any terminal's width.
        output.say(
            f"For {name}, within {ttl}, once: turnout enrol --server HOST:PORT --ca ca.pem --name {name} "
            "--token-file FILE --dir DIR",
            markup=False,
            soft_wrap=True,
        )


def revoke(
    name: NodeName,
    directory: Authority,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Refuse NAME's certificates and tokens from now on; a running server cuts its stream at once."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color) as output:
        from turnout.server.fleet.revocation import revoke_name

        revoke_name(directory, name)
        output.say(f"{name} is revoked. A certificate issued from now on is good again.", markup=False)


def enrol(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server's enrolment address.")],
    ca: Annotated[Path, typer.Option(metavar="FILE", help="The authority's certificate, ca.pem.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="The name that the token was issued for.")],
    token_file: TokenFile,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where NAME.pem, NAME.key and ca.pem go.")
    ],
    server_name: Annotated[
        str | None, typer.Option(metavar="HOST", help="The server's name in its certificate, if not HOST.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up after this long.", min=1)] = 30.0,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Make a key for this node and fetch its certificate with a one-use token."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.client.node.enrol import EnrolmentFailed
        from turnout.client.node.enrol import enrol as fetch

        secret = _token(token_file, output)
        try:
            path = fetch(server, name, secret, directory, ca=ca, server_name=server_name, timeout=timeout)
        except EnrolmentFailed as error:
            output.warn(f"error: {error}")
            raise typer.Exit(REFUSED) from error
        output.data({"name": name, "certificate": str(path)})
        output.say(
            f"{name} is enrolled: {path}. Next: turnout client --certs {directory} --name {name} "
            "--server HOST:PORT",
            markup=False,
            soft_wrap=True,
        )


def seconds(text: str) -> float:
    """Return the seconds in ``"90s"``, ``"30m"``, ``"1h"`` or ``"2d"``. Raises `ConfigError`."""
    from turnout.wire import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ConfigError(f"--ttl {text!r}: write a number and a unit, such as 90s, 30m, 1h or 2d.")
    return float(match[1]) * _UNITS[match[2]]


def _token(source: str, output: Output) -> str:
    from turnout.client.node.enrol import clean_token, read_token

    if source == "-":
        return clean_token(sys.stdin.buffer.read(8192), "stdin")
    path = Path(source)
    secret = read_token(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    # A warning only: mounted secrets are often readable, inside a container of their own.
    if path.is_file() and mode & _OTHERS:
        output.warn(f"token file {path}: permissions {mode:04o} let others read it; run chmod 600 {path}.")
    return secret
