"""Reading certificates and private keys from PEM files."""

from __future__ import annotations

import stat
from pathlib import Path

from turnout.wire.errors import ConfigError


def read_certificate(path: str | Path) -> bytes:
    """Return a PEM file's bytes. Raises `ConfigError` when it cannot be read or holds no certificate."""
    content = _read(path)
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise ConfigError(f"certificate {path}: the file holds no PEM certificate.")
    return content


def read_key(path: str | Path) -> bytes:
    """Return a private key's bytes. Raises `ConfigError` also when others than its owner may read it."""
    content = _read(path)
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"private key {path}: permissions {mode:04o} let others read it; run chmod 600 {path}."
        )
    if b"PRIVATE KEY-----" not in content:
        raise ConfigError(f"private key {path}: the file holds no PEM private key.")
    return content


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"file {path}: {error.strerror or error}.") from error
