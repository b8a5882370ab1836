"""Certificates for a fleet: one authority, a certificate for the server, one for each node."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from turnout.wire.errors import ConfigError
from turnout.wire.pem import read_certificate, read_key

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_EARLIER: Final = datetime.timedelta(minutes=5)  # Clocks differ.


def create_authority(directory: str | Path, *, name: str = "Turnout fleet CA", days: float = 3650) -> None:
    """Write ``ca.pem`` and ``ca.key``. Raises `ConfigError` when there is an authority already."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write(directory / "ca", key, builder.sign(key, hashes.SHA256()))


def create_server(
    directory: str | Path, hosts: Sequence[str], *, name: str = "server", days: float = 825
) -> None:
    """Write ``NAME.pem`` and ``NAME.key`` for a server reached as ``hosts`` (DNS names, IP addresses)."""
    if not hosts:
        raise ConfigError("hosts is empty; name at least one DNS name or IP address of the server.")
    _issue(Path(directory), name, [_host(host) for host in hosts], ExtendedKeyUsageOID.SERVER_AUTH, days)


def create_client(directory: str | Path, name: str, *, days: float = 825) -> None:
    """Write ``NAME.pem`` and ``NAME.key`` for the node enrolled as ``name``; both must stay together."""
    _issue(Path(directory), name, [], ExtendedKeyUsageOID.CLIENT_AUTH, days)


def sign_client(
    directory: str | Path, name: str, key: CertificatePublicKeyTypes, *, days: float = 825
) -> bytes:
    """Return a PEM certificate for the node enrolled as ``name``, which made ``key`` itself."""
    certificate = _sign(Path(directory), name, key, [], ExtendedKeyUsageOID.CLIENT_AUTH, days)
    return certificate.public_bytes(serialization.Encoding.PEM)


def issued_at(certificate: x509.Certificate) -> datetime.datetime:
    """Return when the authority made ``certificate``, to the second."""
    return certificate.not_valid_before_utc + _EARLIER


def check_name(name: str) -> None:
    """Raise `ConfigError` for a name that no certificate may bear."""
    if not _NAME.fullmatch(name) or name == "ca":
        raise ConfigError(f"name={name!r}: use 1 to 64 letters, digits, '.', '_' or '-', and not 'ca'.")


def _issue(
    directory: Path, name: str, hosts: list[x509.GeneralName], usage: x509.ObjectIdentifier, days: float
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(directory, name, key.public_key(), hosts, usage, days)
    _write(directory / name, key, certificate)


def _sign(
    directory: Path,
    name: str,
    key: CertificatePublicKeyTypes,
    hosts: list[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    days: float,
) -> x509.Certificate:
    check_name(name)
    authority = x509.load_pem_x509_certificate(read_certificate(directory / "ca.pem"))
    authority_key = serialization.load_pem_private_key(read_key(directory / "ca.key"), None)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{directory / 'ca.key'} is no elliptic-curve key; make a new authority.")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A life that is over already (days below 0) is for tests of exactly that.
        .not_valid_before(min(now, now + datetime.timedelta(days=days)) - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Write a new pair; what exists is never replaced, since others may depend on it."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    # with_name, because with_suffix would cut a name such as site.example at its dot.
    paths = [
        (stem.with_name(f"{stem.name}.key"), private, 0o600),
        (stem.with_name(f"{stem.name}.pem"), public, 0o644),
    ]
    for path, content, mode in paths:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError as error:
            raise ConfigError(f"{path} exists; remove it first if it is not in use.") from error
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
