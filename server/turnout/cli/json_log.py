"""Log lines as JSON objects, one a line, for whatever collects logs: ``TURNOUT_LOG_FORMAT=json``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import typer

VARIABLE: Final = "TURNOUT_LOG_FORMAT"
#: What a line is about, where its record says so (``extra``) or the command knows.
FIELDS: Final = ("run", "round", "client")


def wants_json() -> bool:
    """Return whether the environment asks for JSON; BadParameter for a format that does not exist."""
    wanted = os.environ.get(VARIABLE, "text")
    if wanted not in ("", "text", "json"):
        raise typer.BadParameter(f"{VARIABLE}={wanted!r} is no log format; set it to json or text.")
    return wanted == "json"


class JsonFormatter(logging.Formatter):
    """Writes ``time`` (UTC), ``level``, ``logger``, ``message``, the fields that are known, ``traceback``.

    ``context`` has the fields of records that say nothing themselves; it may change.
    """

    def __init__(self, context: Mapping[str, Any]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without line breaks in it."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for field in FIELDS:
            value = getattr(record, field, self._context.get(field))
            if value is not None:
                line[field] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
