"""Tables of a run for other programs: CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from turnout.server.documents import write_atomically
from turnout.server.schema import ClientRoundRow

_CLIENT_COLUMNS: Final = (
    "round", "client", "outcome", "role", "num-examples", "weight", "staleness", "train-loss",
    "train-seconds", "update-norm", "reason",
)  # fmt: skip


def client_documents(rows: Iterable[ClientRoundRow]) -> list[dict[str, Any]]:
    """Return client outcomes as documents with kebab-case keys."""
    return [{key: getattr(row, key.replace("-", "_")) for key in _CLIENT_COLUMNS} for row in rows]


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Return ``rows`` as CSV; text that a spreadsheet would run as a formula is quoted."""
    columns = list(columns)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([cell(row.get(column)) for column in columns])
    return buffer.getvalue()


def clients_csv(rows: Iterable[ClientRoundRow]) -> str:
    """Return client outcomes as CSV."""
    return csv_text(client_documents(rows), _CLIENT_COLUMNS)


def write_clients_csv(path: Path, rows: Iterable[ClientRoundRow]) -> None:
    """Write client outcomes to ``path``, whole or not at all."""
    write_atomically(path, clients_csv(rows))


def cell(value: Any) -> Any:
    """Return ``value`` for a CSV file: text that a spreadsheet would run as a formula is quoted."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
