"""The server's certificates."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509

from turnout.server.fleet.revocation import REVOKED_FILE
from turnout.wire.errors import ConfigError
from turnout.wire.pem import read_certificate, read_key


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Paths of PEM files. ``client_ca`` makes TLS mutual: clients need certificates that it signed.

    ``revoked`` lists those of them that are not accepted any more; by default ``revoked.json`` beside
    ``client_ca``, if there is one.
    """

    certificate: str | Path
    key: str | Path
    client_ca: str | Path | None = None
    revoked: str | Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials.

        Raises `ConfigError` for unreadable files, loose key permissions and a certificate out of date.
        """
        pair = (read_key(self.key), read_certificate(self.certificate))
        _check_dates(self.certificate, pair[1])
        if self.client_ca is None:
            return grpc.ssl_server_credentials([pair])
        authority = read_certificate(self.client_ca)
        _check_dates(self.client_ca, authority)
        return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)

    def revocations(self) -> Path | None:
        """Return the file that lists revoked names, which need not exist; None without a client CA."""
        if self.revoked is not None:
            return Path(self.revoked)
        return None if self.client_ca is None else Path(self.client_ca).with_name(REVOKED_FILE)


def _check_dates(path: str | Path, content: bytes) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ConfigError(f"certificate {path}: not readable ({error}).") from error
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.datetime.now(datetime.UTC)
    if not first <= now <= last:
        raise ConfigError(
            f"certificate {path}: valid from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, and it is "
            f"{now:%Y-%m-%d %H:%M} UTC; issue a new one or set the clock."
        )
