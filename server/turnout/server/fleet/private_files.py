"""Files beside the authority that the command line and a running server both read and change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turnout.wire.errors import ConfigError
from turnout.wire.whole_file import replace_file

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; one writer at a time is then the user's care.
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads out while ``path`` is read, changed and written back."""
    # A file of its own: the one that is guarded is replaced, and a lock belongs to the file that was opened.
    try:
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"directory {path.parent}: {error.strerror or error}.") from error
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_document(path: Path) -> dict[str, Any]:
    """Return a JSON file's object, empty without a file. Raises `ConfigError` when it is unreadable."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable ({error}); restore it from a backup.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds no JSON object; restore it from a backup.")
    return document


def write_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path``, synced to disk; a crash leaves the old file or the new one.

    Raises `ConfigError` when the disk refuses.
    """
    try:
        replace_file(path, content, mode=mode)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written, {error.strerror or error}.") from error


def write_document(path: Path, document: dict[str, Any], *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``document`` as JSON, as `write_file` does."""
    write_file(path, (json.dumps(document, indent=1) + "\n").encode(), mode=mode)
