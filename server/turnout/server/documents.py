"""Small files written whole or not at all, and JSON that every reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.wire.durable import unwritten
from turnout.wire.whole_file import replace_file


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``, synced to disk; a crash leaves the old file or the new one."""
    data = content.encode() if isinstance(content, str) else content
    try:
        replace_file(path, data, mode=0o644)
    except OSError as error:
        raise unwritten(error, path, len(data)) from error


def finite(value: Any) -> Any:
    """Return ``value`` with every float that JSON cannot express (NaN, infinity) replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def json_line(value: Any) -> str:
    """Return ``value`` as strict JSON on one line, without the newline."""
    return json.dumps(finite(value), allow_nan=False)


def json_document(value: Any) -> str:
    """Return ``value`` as strict, indented JSON with a final newline."""
    return json.dumps(finite(value), allow_nan=False, indent=2) + "\n"
