"""Runs: the list with its filters, one run in full, its headline and its totals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, Row, Select, bindparam, func, select

from turnout.dashboard.models.fields import RunStatus
from turnout.dashboard.models.runs import (
    Facet,
    Facets,
    Headline,
    RunDetail,
    RunList,
    RunSummary,
    SeriesSummary,
    Totals,
)
from turnout.dashboard.queries import series
from turnout.dashboard.reader import StoreReader
from turnout.dashboard.status import run_status
from turnout.server.documents import finite
from turnout.server.errors import StoreError
from turnout.server.schema import RoundRow, RunRow

RunSort = Literal["created", "heartbeat", "name", "strategy", "task", "status", "rounds", "seconds", "metric"]

_SPARKLINE: Final = 60
_FACETS: Final = 100
_ERROR_CHARACTERS: Final = 300
_ENVIRONMENT_BYTES: Final = 1 << 20
_SORTED_BY_METRIC: Final = 2_000
_RECENT_ROUNDS: Final = 50
_LIVING: Final = 1_000
_ALIVE: Final = ("running", "stale", "lost")
_ROUNDS_DONE: Final = select(func.max(RoundRow.round)).where(RoundRow.run_id == bindparam("run"))


class UnknownRun(StoreError):  # noqa: N818 - what it is, not that it is an error
    """There is no such run."""


@dataclass(frozen=True)
class RunFilter:
    """What the list shows; None and empty for everything."""

    status: Sequence[str] = ()
    strategy: Sequence[str] = ()
    task: Sequence[str] = ()
    study: Sequence[str] = ()
    text: str = ""


def find_run(connection: Connection, run: str) -> Row[Any]:
    """Return a run's row by its exact id. Raises `UnknownRun`."""
    row = connection.execute(select(RunRow.__table__).where(RunRow.id == run)).first()
    if row is None:
        raise UnknownRun(f"run {run[:64]!r} is not in the store.")
    return row


def rounds_done(connection: Connection, run: str) -> int:
    """Return the last committed round, 0 before the first."""
    return connection.execute(_ROUNDS_DONE, {"run": run}).scalar() or 0


def version_of(row: Row[Any], done: int) -> tuple[object, ...]:
    """Return what changes whenever something of a run does: the version of all that is remembered of it."""
    return row.status, row.heartbeat_at, done


def run_list(
    reader: StoreReader,
    wanted: RunFilter,
    *,
    sort: RunSort,
    descending: bool,
    limit: int,
    offset: int,
) -> RunList:
    """Return one page of the runs that match."""
    with reader.connect() as connection:
        living = _living(reader, connection)
        conditions = _conditions(wanted, living)
        query = select(RunRow.__table__).where(*conditions)
        total = connection.execute(select(func.count()).select_from(RunRow).where(*conditions)).scalar()
        if sort == "metric":
            items = _by_metric(reader, connection, query, descending, limit, offset)
        else:
            column = _sort_column(sort)
            keys = (column.desc(), RunRow.id.desc()) if descending else (column.asc(), RunRow.id.asc())
            rows = connection.execute(query.order_by(*keys).limit(limit).offset(offset)).all()
            items = [summary(reader, connection, row) for row in rows]
        return RunList(
            items=items, total=total or 0, limit=limit, offset=offset, facets=_facets(connection, living)
        )


def summary(reader: StoreReader, connection: Connection, row: Row[Any]) -> RunSummary:
    """Return one line of the list."""
    done = rounds_done(connection, row.id)
    headline = reader.memo.get(
        ("headline", row.id), version_of(row, done), lambda: _headline(connection, row.id)
    )
    return RunSummary(
        id=row.id,
        name=row.name,
        strategy=row.strategy,
        task=row.task,
        study=row.study,
        status=run_status(reader, row, done),
        seed=row.seed,
        rounds_done=done,
        num_rounds=row.num_rounds,
        num_clients=row.num_clients,
        created_at=row.created_at,
        heartbeat_at=row.heartbeat_at,
        finished_at=row.finished_at,
        seconds=row.seconds,
        error=row.error.strip().partition("\n")[0][:_ERROR_CHARACTERS] if row.error else None,
        headline=headline,
    )


def run_detail(reader: StoreReader, run: str) -> RunDetail:
    """Return one run. Raises `UnknownRun`."""
    with reader.connect() as connection:
        row = find_run(connection, run)
        brief = summary(reader, connection, row)
        done = brief.rounds_done
        version = version_of(row, done)
        totals = reader.memo.get(("totals", run), version, lambda: _totals(connection, run))
        listed = reader.memo.get(("series", run), version, lambda: _series(connection, run))
        typical = _median_round(connection, run)
    remaining = row.num_rounds - done
    live = brief.status == "running" and typical is not None
    return RunDetail(
        **brief.model_dump(),
        directory=reader.directory(row.directory).name,
        config=finite(row.config) if isinstance(row.config, dict) else {},
        environment=_environment(reader, row),
        error_text=row.error,
        model_sha256=row.model_sha256,
        totals=totals,
        series=listed,
        median_round_seconds=typical,
        eta_seconds=remaining * typical if live and typical is not None else None,
    )


def default_series(connection: Connection, run: str) -> tuple[str, str] | None:
    """Return (kind, name) of the series that stands for a run: held-out accuracy, loss, else any."""
    for kind, name in (("evaluate", "accuracy"), ("evaluate", "loss")):
        if series.last_point(connection, run, kind, name) is not None:
            return kind, name
    ends = series.series_ends(connection, run)
    others = [end for end in ends if end.kind == "evaluate"] or [
        end for end in ends if end.name == "train-loss"
    ]
    return (others[0].kind, others[0].name) if others else None


def _headline(connection: Connection, run: str) -> Headline | None:
    found = default_series(connection, run)
    if found is None:
        return None
    kind, name = found
    last = series.last_point(connection, run, kind, name)
    if last is None:
        return None
    best = series.best_point(connection, run, kind, name) or last
    return Headline(
        kind=kind,  # type: ignore[arg-type]
        name=name,
        higher_is_better=series.higher_is_better(name),
        last=last[1],
        last_round=last[0],
        best=best[1],
        best_round=best[0],
        sparkline=series.outline(connection, run, kind, name, _SPARKLINE),
    )


def _living(reader: StoreReader, connection: Connection) -> dict[str, RunStatus]:
    """Return the state of every run whose row says running: that it runs, is stale, or is lost."""
    query = select(RunRow.__table__).where(RunRow.status == "running").order_by(RunRow.created_at.desc())
    rows = connection.execute(query.limit(_LIVING)).all()
    return {row.id: run_status(reader, row, rounds_done(connection, row.id)) for row in rows}


def _conditions(wanted: RunFilter, living: dict[str, RunStatus]) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.status:
        alive = [run for run, status in living.items() if status in wanted.status]
        ended = [status for status in wanted.status if status not in _ALIVE]
        conditions.append(RunRow.id.in_(alive) | RunRow.status.in_(ended))
    for column, values in (
        (RunRow.strategy, wanted.strategy),
        (RunRow.task, wanted.task),
        (RunRow.study, wanted.study),
    ):
        if values:
            conditions.append(column.in_(list(values)))
    for word in wanted.text.split():
        columns = (RunRow.id, RunRow.name, RunRow.strategy, RunRow.task, RunRow.study, RunRow.status)
        matches = [func.lower(column).contains(word.lower(), autoescape=True) for column in columns]
        either = matches[0]
        for match in matches[1:]:
            either = either | func.coalesce(match, False)
        conditions.append(either)
    return conditions


def _sort_column(sort: str) -> ColumnElement[Any]:
    if sort == "rounds":
        done = select(func.max(RoundRow.round)).where(RoundRow.run_id == RunRow.id)
        return func.coalesce(done.scalar_subquery(), 0)
    name = {"created": "created_at", "heartbeat": "heartbeat_at"}.get(sort, sort)
    column: ColumnElement[Any] = RunRow.__table__.c[name]
    return column


def _by_metric(
    reader: StoreReader,
    connection: Connection,
    query: Select[Any],
    descending: bool,
    limit: int,
    offset: int,
) -> list[RunSummary]:
    """Sort by the best headline value; runs without one come last. Of many runs the newest take part."""
    rows = connection.execute(query.order_by(RunRow.created_at.desc()).limit(_SORTED_BY_METRIC)).all()
    found = [summary(reader, connection, row) for row in rows]
    known = [item for item in found if item.headline is not None and item.headline.best is not None]
    unknown = [item for item in found if item.headline is None or item.headline.best is None]
    known.sort(key=lambda item: (item.headline.best, item.id), reverse=descending)  # type: ignore[union-attr]
    return (known + unknown)[offset : offset + limit]


def _facets(connection: Connection, living: dict[str, RunStatus]) -> Facets:
    found = {}
    for name in ("status", "strategy", "task", "study"):
        column = RunRow.__table__.c[name]
        count = func.count()
        query = select(column, count).where(column.is_not(None)).group_by(column)
        rows = connection.execute(query.order_by(count.desc(), column).limit(_FACETS))
        found[name] = [Facet(value=value, count=number) for value, number in rows]
    ended = [facet for facet in found["status"] if facet.value not in _ALIVE]
    alive = [Facet(value=value, count=count) for value, count in Counter(living.values()).items()]
    found["status"] = sorted((*ended, *alive), key=lambda facet: (-facet.count, facet.value))
    return Facets(**found)


def _totals(connection: Connection, run: str) -> Totals:
    names = ("invited", "participants", "failed", "rejected", "missing", "sent_bytes", "received_bytes")
    sums = [func.sum(RoundRow.__table__.c[name]) for name in names]
    row = connection.execute(select(*sums).where(RoundRow.run_id == run)).one()
    values = {name: None if value is None else int(value) for name, value in zip(names, row, strict=True)}
    sent, received = values.pop("sent_bytes"), values.pop("received_bytes")
    counts = {name: value or 0 for name, value in values.items()}
    return Totals(**counts, sent_bytes=sent, received_bytes=received)


def _series(connection: Connection, run: str) -> list[SeriesSummary]:
    return [
        SeriesSummary(kind=end.kind, name=end.name, last=end.value, last_round=end.round)  # type: ignore[arg-type]
        for end in series.series_ends(connection, run)
    ]


def _median_round(connection: Connection, run: str) -> float | None:
    query = select(RoundRow.committed_at).where(RoundRow.run_id == run).order_by(RoundRow.round.desc())
    moments = [row[0] for row in connection.execute(query.limit(_RECENT_ROUNDS + 1))]
    gaps = [(later - earlier).total_seconds() for later, earlier in pairwise(moments)]
    return median(gaps) if gaps else None


def _environment(reader: StoreReader, row: Row[Any]) -> dict[str, Any] | None:
    file = reader.directory(row.directory) / "environment.json"
    try:
        if file.stat().st_size > _ENVIRONMENT_BYTES:
            return None
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return finite(document) if isinstance(document, dict) else None


def server_time() -> datetime:
    """Return now, in UTC."""
    return datetime.now(UTC)
