"""What every durable file needs: a rename that lasts, and an error that says what did not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Make a rename inside ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritten(error: OSError, path: Path, size: int) -> OSError:
    """Return ``error`` with the file and the ``size`` in bytes that could not be made durable."""
    free = shutil.disk_usage(path.parent).free
    reason = f"{error.strerror} ({size} bytes were to be written, {free} are free)"
    return OSError(error.errno, reason, str(path))
