"""``turnout certs``: the authority of a fleet and the certificates that it signs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from turnout.cli import enrol
from turnout.cli.output import Json, NoColor, Output, Quiet, Verbose

if TYPE_CHECKING:
    from datetime import datetime

app = typer.Typer(no_args_is_help=True, help="Make, show and revoke the certificates of a fleet.")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the certificates.")]
Authority = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where turnout certs init put them.")]
Host = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="NAME",
        help="A DNS name or IP address that clients use for the server. Repeatable; localhost by default.",
    ),
]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of nodes, one certificate each.")]
Days = Annotated[float, typer.Option(min=0.01, help="How long the certificate is valid.")]

WARN_DAYS: Final = 14


@app.command()
def init(
    directory: Directory,
    host: Host = None,
    days: Days = 825,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Make an authority (ca.pem, ca.key) and the server's certificate (server.pem, server.key).

    With an authority in DIR already, only the server's certificate is made.
    """
    with Output(quiet=quiet, verbose=verbose, no_color=no_color) as output:
        from turnout.server.fleet.certs import create_authority, create_server
        from turnout.wire import ConfigError

        if (directory / "server.pem").exists():
            raise ConfigError(
                f"{directory} has a server certificate; to replace it, remove server.pem and server.key."
            )
        if not (directory / "ca.pem").exists():
            create_authority(directory)
        create_server(directory, host or ["localhost", "127.0.0.1", "::1"], days=days)
        for line in (
            f"Made {directory}/ca.pem and server.pem. Keep ca.key off the machines of clients.",
            f"For a node:  turnout certs client NAME --dir {directory}",
            "             and bring ca.pem, NAME.pem and NAME.key there, the key over a safe way",
            f"Server:      turnout server FILE --certs {directory}",
        ):
            output.say(line, markup=False, soft_wrap=True)


@app.command()
def client(
    names: Names,
    directory: Authority,
    days: Days = 825,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Make a certificate and a key for each node: NAME.pem and NAME.key."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color) as output:
        from turnout.server.fleet.certs import create_client
        from turnout.wire import ConfigError

        if not (directory / "ca.pem").exists():
            raise ConfigError(f"--dir {directory} holds no authority; run turnout certs init {directory}.")
        for name in names:
            create_client(directory, name, days=days)
            output.say(f"Made {directory}/{name}.pem and {name}.key", markup=False, soft_wrap=True)


@app.command()
def show(
    directory: Directory,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Show the certificates in DIR: whose, until when, and their fingerprints."""
    with Output(quiet=quiet, verbose=verbose, no_color=no_color, as_json=as_json) as output:
        from turnout.cli.tables import result_table
        from turnout.wire import ConfigError

        rows = [_row(path) for path in sorted(directory.glob("*.pem"))]
        if not rows:
            raise ConfigError(f"{directory} holds no certificate; run turnout certs init {directory}.")
        output.data(rows)
        table = result_table()
        for column in ("file", "name", "hosts", "valid from", "valid until", "days left", "SHA-256"):
            table.add_column(column, overflow="fold", justify="right" if column == "days left" else "left")
        for row in rows:
            table.add_row(
                row["file"],
                row["name"],
                ", ".join(row["hosts"]),
                row["valid-from"][:10],
                row["valid-until"][:10],
                str(row["days-left"]),
                row["sha256"],
            )
        output.show(table)
        for row in rows:
            if row["days-left"] < WARN_DAYS:
                left = row["days-left"]
                said = f"expires in {left} days" if left >= 0 else "has expired"
                output.warn(f"{row['file']} {said}; make a new one and restart who uses it")


def _row(path: Path) -> dict[str, Any]:
    from datetime import UTC, datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    from turnout.wire import ConfigError
    from turnout.wire.pem import read_certificate

    try:
        certificate = x509.load_pem_x509_certificate(read_certificate(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate: {error}") from error
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [str(other.value) for other in others]
    except x509.ExtensionNotFound:
        hosts = []
    until: datetime = certificate.not_valid_after_utc
    return {
        "file": path.name,
        "name": str(names[0].value) if names else "",
        "hosts": hosts,
        "valid-from": certificate.not_valid_before_utc.isoformat(),
        "valid-until": until.isoformat(),
        "days-left": (until - datetime.now(UTC)).days,
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


app.command("token")(enrol.token)
app.command("revoke")(enrol.revoke)
