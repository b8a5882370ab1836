"""Small files that are replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from turnout.wire.durable import sync_directory


def replace_file(path: Path, content: bytes, *, mode: int) -> None:
    """Replace ``path`` by ``content``, synced to disk; a crash leaves the old file or the new one.

    Raises OSError when the disk refuses; then nothing is left behind.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)  # mkstemp makes private files.
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
