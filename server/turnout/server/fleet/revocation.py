"""Certificates that are not accepted any more: a file that a running server reads again when it changes."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from turnout.server.fleet.certs import check_name, issued_at
from turnout.server.fleet.private_files import locked, read_document, write_document
from turnout.server.fleet.tokens import TokenBook
from turnout.wire.errors import ConfigError

log = logging.getLogger("turnout.server.fleet.security")

REVOKED_FILE: Final = "revoked.json"


def revoke_name(directory: str | Path, name: str) -> None:
    """Refuse every certificate and token that ``name`` has got until now; a later certificate is good again.

    Servers that use ``directory`` notice within a second. Raises `ConfigError` for an impossible name and for
    a directory without an authority.
    """
    check_name(name)
    directory = Path(directory)
    if not (directory / "ca.pem").exists():
        raise ConfigError(f"directory {directory} holds no authority (ca.pem); name the one that signed.")
    TokenBook(directory).void(name)  # First: what is signed before this moment is then on the list below.
    path = directory / REVOKED_FILE
    with locked(path):
        names = _names(path)
        names[name] = datetime.datetime.now(datetime.UTC)
        rows = {key: when.isoformat(timespec="seconds") for key, when in sorted(names.items())}
        # Not secret, and the server may run as another user.
        write_document(path, {"revoked": rows}, mode=0o644)


class RevocationList:
    """What ``path`` says; a file that does not exist revokes nobody."""

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._seen: tuple[int, ...] = ()
        self._names: Mapping[str, datetime.datetime] = {}
        if self._path is not None:
            self._seen, self._names = _stamp(self._path), _names(self._path)

    def reread(self) -> list[str]:
        """Read the file again if it has changed; return the names that were revoked meanwhile.

        A file that has become unreadable is reported, and what was read last stays in force.
        """
        if self._path is None:
            return []
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return []
        self._seen = stamp
        try:
            names = _names(self._path)
        except ConfigError as error:
            log.error("revocations stay as they were: %s", error)
            return []
        fresh = [name for name, when in names.items() if self._names.get(name) != when]
        self._names = names
        return fresh

    def refuses(self, name: str, certificate: x509.Certificate | None) -> bool:
        """Return whether ``name`` has been revoked since ``certificate`` was made (None: whether at all)."""
        when = self._names.get(name)
        return when is not None and (certificate is None or issued_at(certificate) <= when)


def _names(path: Path) -> dict[str, datetime.datetime]:
    rows: Any = read_document(path).get("revoked", {})
    try:
        names = {str(name): datetime.datetime.fromisoformat(when) for name, when in rows.items()}
        if any(when.tzinfo is None for when in names.values()):
            raise ValueError("a time without a zone")
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not readable ({error}); it maps names to times under 'revoked', such as "
            '{"revoked": {"site-a": "2026-01-31T12:00:00+00:00"}}.'
        ) from error
    return names


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_mtime_ns, status.st_size)
