"""The server's certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from turnout.wire.pem import read_certificate, read_key


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Paths of PEM files. ``client_ca`` makes TLS mutual: clients need certificates that it signed."""

    certificate: str | Path
    key: str | Path
    client_ca: str | Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials. Raises `ConfigError` for unreadable files and loose key permissions."""
        pair = (read_key(self.key), read_certificate(self.certificate))
        if self.client_ca is None:
            return grpc.ssl_server_credentials([pair])
        authority = read_certificate(self.client_ca)
        return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)
