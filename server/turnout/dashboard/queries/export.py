"""Tables for other programs, a page of rows at a time, so that no export is ever whole in memory.

Every page is a short transaction of its own: a long one would keep SQLite's write-ahead log from being
folded back.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

from sqlalchemy import Connection, literal, select, tuple_

from turnout.dashboard.queries.rounds import rounds_after
from turnout.dashboard.queries.runs import find_run, rounds_done
from turnout.dashboard.reader import StoreReader
from turnout.server.documents import json_line
from turnout.server.export import cell
from turnout.server.schema import ClientId, ClientRoundRow, MetricRow, RunRow, UtcTime

Table = Literal["rounds", "metrics", "clients"]
Format = Literal["csv", "json"]
_Rows = Iterator[dict[str, Any]]

_PAGE: Final = 2_000
RUN_COLUMNS: Final = (
    "id", "name", "strategy", "task", "status", "study", "seed", "num_rounds", "rounds_done", "num_clients",
    "created_at", "finished_at", "seconds", "model_sha256", "error",
)  # fmt: skip
ROUND_COLUMNS: Final = (
    "round", "invited", "participants", "failed", "rejected", "missing", "select_seconds", "train_seconds",
    "fold_seconds", "finish_seconds", "evaluate_seconds", "checkpoint_seconds", "sent_bytes",
    "received_bytes", "committed_at",
)  # fmt: skip
METRIC_COLUMNS: Final = ("kind", "name", "round", "value")
CLIENT_COLUMNS: Final = (
    "round", "client", "outcome", "role", "num_examples", "weight", "staleness", "train_loss",
    "train_seconds", "update_norm", "reason",
)  # fmt: skip
COLUMNS: Final = {"rounds": ROUND_COLUMNS, "metrics": METRIC_COLUMNS, "clients": CLIENT_COLUMNS}


def encoded(rows: Iterable[dict[str, Any]], columns: Iterable[str], as_: Format) -> Iterator[str]:
    """Yield ``rows`` as CSV, in which no text is a formula, or as one JSON array; about 64 kB at a time."""
    pieces = _csv(rows, list(columns)) if as_ == "csv" else _json(rows)
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size > 1 << 16:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def run_rows(reader: StoreReader) -> _Rows:
    """Yield all runs, oldest first."""

    def page(connection: Connection, last: dict[str, Any] | None) -> list[dict[str, Any]]:
        query = select(RunRow.__table__).order_by(RunRow.created_at, RunRow.id)
        if last is not None:
            key = tuple_(RunRow.created_at, RunRow.id)
            query = query.where(key > tuple_(literal(last["_created"], UtcTime), last["id"]))
        return [
            {name: getattr(row, name) for name in RUN_COLUMNS if name != "rounds_done"}
            | {"rounds_done": rounds_done(connection, row.id), "_created": row.created_at}
            for row in connection.execute(query.limit(_PAGE))
        ]

    for row in _pages(reader, page):
        del row["_created"]
        yield _plain(row)


def table_rows(reader: StoreReader, run: str, table: Table) -> _Rows:
    """Yield one table of a run. Raises `UnknownRun` at once."""
    with reader.connect() as connection:
        find_run(connection, run)
    page = {"rounds": _round_page, "metrics": _metric_page, "clients": _client_page}[table]
    return map(_plain, _pages(reader, lambda connection, last: page(connection, run, last)))


def _pages(
    reader: StoreReader, page: Callable[[Connection, dict[str, Any] | None], list[dict[str, Any]]]
) -> _Rows:
    last = None
    while True:
        with reader.connect() as connection:
            rows = page(connection, last)
        if not rows:
            return
        last = dict(rows[-1])
        yield from rows


def _round_page(connection: Connection, run: str, last: dict[str, Any] | None) -> list[dict[str, Any]]:
    found = []
    for item in rounds_after(connection, run, last["round"] if last else 0, _PAGE, metrics=False):
        row = item.model_dump(exclude={"seconds", "metrics", "has_checkpoint"})
        row |= {f"{phase}_seconds": value for phase, value in item.seconds}
        found.append(row)
    return found


def _metric_page(connection: Connection, run: str, last: dict[str, Any] | None) -> list[dict[str, Any]]:
    columns = (MetricRow.kind, MetricRow.name, MetricRow.round)
    query = select(*columns, MetricRow.value).where(MetricRow.run_id == run).order_by(*columns)
    if last is not None:
        query = query.where(tuple_(*columns) > tuple_(last["kind"], last["name"], last["round"]))
    return [dict(row) for row in connection.execute(query.limit(_PAGE)).mappings()]


def _client_page(connection: Connection, run: str, last: dict[str, Any] | None) -> list[dict[str, Any]]:
    key = (ClientRoundRow.round, ClientRoundRow.client)
    columns = [ClientRoundRow.__table__.c[name] for name in CLIENT_COLUMNS]
    query = select(*columns).where(ClientRoundRow.run_id == run).order_by(*key)
    if last is not None:
        query = query.where(tuple_(*key) > tuple_(last["round"], literal(last["client"], ClientId)))
    return [dict(row) for row in connection.execute(query.limit(_PAGE)).mappings()]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.isoformat() if hasattr(value, "isoformat") else value for key, value in row.items()}


def _csv(rows: Iterable[dict[str, Any]], columns: list[str]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([cell(row.get(column)) for column in columns])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _json(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield "["
    for number, row in enumerate(rows):
        yield (",\n" if number else "\n") + json_line(row)
    yield "\n]\n"
