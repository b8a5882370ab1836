"""Rounds, their clock, and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, Row, func, select

from turnout.dashboard.models.rounds import (
    EventItem,
    EventPage,
    PhaseSeconds,
    RoundItem,
    RoundMetrics,
    RoundPage,
)
from turnout.dashboard.queries.runs import find_run, rounds_done
from turnout.dashboard.queries.series import metrics_between
from turnout.dashboard.reader import StoreReader
from turnout.server.schema import EventRow, RoundRow
from turnout.wire import NDArray


def round_page(
    reader: StoreReader, run: str, *, after: int | None, limit: int, descending: bool, metrics: bool
) -> RoundPage:
    """Return rounds beyond the cursor ``after``. Raises `UnknownRun`."""
    with reader.connect() as connection:
        find_run(connection, run)
        query = select(RoundRow.__table__).where(RoundRow.run_id == run)
        if after is not None:
            query = query.where(RoundRow.round < after if descending else RoundRow.round > after)
        order = RoundRow.round.desc() if descending else RoundRow.round.asc()
        rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
        more, rows = len(rows) > limit, rows[:limit]
        return RoundPage(
            items=_items(connection, run, rows, metrics),
            rounds_done=rounds_done(connection, run),
            next=rows[-1].round if more else None,
        )


def rounds_after(
    connection: Connection, run: str, after: int, limit: int, *, metrics: bool = True
) -> list[RoundItem]:
    """Return the next rounds."""
    query = select(RoundRow.__table__).where(RoundRow.run_id == run, RoundRow.round > after)
    rows = connection.execute(query.order_by(RoundRow.round).limit(limit)).all()
    return _items(connection, run, rows, metrics)


@dataclass(frozen=True)
class Clock:
    """What a run has cost up to and including every round: seconds of work, bytes (NaN: nobody counts)."""

    rounds: NDArray
    seconds: NDArray
    bytes: NDArray

    def at(self, rounds: NDArray, axis: Literal["seconds", "bytes"] = "seconds") -> NDArray:
        """Return what it had cost at each of ``rounds``; 0 for the initial model."""
        values = self.seconds if axis == "seconds" else self.bytes
        start = 0.0 if not len(values) or np.isfinite(values[0]) else np.nan
        return np.concatenate(([start], values))[np.searchsorted(self.rounds, rounds, side="right")]


def clock(connection: Connection, run: str) -> Clock:
    """Return what a run has cost by round."""
    parts = (
        RoundRow.select_seconds
        + RoundRow.train_seconds
        + RoundRow.finish_seconds
        + RoundRow.evaluate_seconds
        + func.coalesce(RoundRow.checkpoint_seconds, 0.0)
    )
    query = select(RoundRow.round, parts, RoundRow.sent_bytes, RoundRow.received_bytes)
    rows = connection.execute(query.where(RoundRow.run_id == run).order_by(RoundRow.round)).all()
    seconds = np.array([row[1] for row in rows], dtype=np.float64)
    moved = np.array([(row[2] or 0) + (row[3] or 0) for row in rows], dtype=np.float64)
    counted = any(row[2] is not None or row[3] is not None for row in rows)
    return Clock(
        rounds=np.array([row[0] for row in rows], dtype=np.int64),
        seconds=np.cumsum(np.nan_to_num(seconds, posinf=0.0, neginf=0.0)),
        bytes=np.cumsum(moved) if counted else np.full(len(rows), np.nan),
    )


def event_page(reader: StoreReader, run: str | None, *, after: int, limit: int) -> EventPage:
    """Return events of a run (of all, for None) beyond ``after``. Raises `UnknownRun`."""
    with reader.connect() as connection:
        if run is not None:
            find_run(connection, run)
        items = events_after(connection, None if run is None else [run], after, limit + 1)
    more, items = len(items) > limit, items[:limit]
    return EventPage(items=items, next=items[-1].id if items else after, more=more)


def events_after(connection: Connection, runs: list[str] | None, after: int, limit: int) -> list[EventItem]:
    """Return events of ``runs`` (of all, for None) whose number is greater than ``after``."""
    query = select(EventRow.__table__).where(EventRow.id > after)
    if runs is not None:
        query = query.where(EventRow.run_id.in_(runs))
    rows = connection.execute(query.order_by(EventRow.id).limit(limit))
    return [
        EventItem(
            id=row.id,
            run=row.run_id,
            round=row.round,
            kind=row.kind,
            message=row.message,
            created_at=row.created_at,
        )
        for row in rows
    ]


def last_event(connection: Connection) -> int:
    """Return the newest event's number."""
    return connection.execute(select(func.max(EventRow.id))).scalar() or 0


def _items(connection: Connection, run: str, rows: list[Row[Any]] | Any, metrics: bool) -> list[RoundItem]:
    measured = {}
    if metrics and rows:
        numbers = [row.round for row in rows]
        measured = metrics_between(connection, run, min(numbers), max(numbers))
    empty: dict[str, dict[str, float | None]] = {"train": {}, "evaluate": {}, "diagnostics": {}}
    return [
        round_item(row, RoundMetrics(**measured.get(row.round, empty)) if metrics else None) for row in rows
    ]


def round_item(row: Row[Any], metrics: RoundMetrics | None) -> RoundItem:
    """Return the document of one round."""
    return RoundItem(
        round=row.round,
        invited=row.invited,
        participants=row.participants,
        failed=row.failed,
        rejected=row.rejected,
        missing=row.missing,
        seconds=PhaseSeconds(
            select=row.select_seconds,
            train=row.train_seconds,
            fold=row.fold_seconds,
            finish=row.finish_seconds,
            evaluate=row.evaluate_seconds,
            checkpoint=row.checkpoint_seconds,
        ),
        sent_bytes=row.sent_bytes,
        received_bytes=row.received_bytes,
        has_checkpoint=row.checkpoint is not None,
        committed_at=row.committed_at,
        metrics=metrics,
    )
