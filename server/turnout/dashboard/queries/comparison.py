"""Several runs beside each other: one metric on one axis, how each ended, what they were told differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, func, select

from turnout.dashboard.downsampling import downsampled
from turnout.dashboard.models.comparison import (
    ComparedRun,
    ComparedSeries,
    Comparison,
    ConfigDiff,
    Difference,
)
from turnout.dashboard.queries import series
from turnout.dashboard.queries.rounds import Clock, clock
from turnout.dashboard.queries.runs import default_series, find_run, summary, version_of
from turnout.dashboard.queries.series import Points
from turnout.dashboard.reader import StoreReader
from turnout.server.documents import finite
from turnout.server.schema import RoundRow
from turnout.wire import NDArray

Axis = Literal["round", "seconds", "bytes"]


@dataclass(frozen=True)
class _Compared:
    """One run's series: all of it, what is drawn, and where on the axis that is."""

    run: str
    whole: Points
    drawn: Points
    x: NDArray
    clock: Clock


def comparison(
    reader: StoreReader,
    runs: Sequence[str],
    *,
    metric: tuple[str, str] | None,
    axis: Axis,
    points: int,
    target: float | None,
) -> Comparison:
    """Return runs on one axis; ``metric`` (kind, name) defaults to what the first run is known for.

    Raises `UnknownRun`.
    """
    with reader.connect() as connection:
        rows = [find_run(connection, run) for run in runs]
        chosen = metric or next(filter(None, (default_series(connection, run) for run in runs)), None)
        kind, name = chosen or ("evaluate", "accuracy")
        briefs = [summary(reader, connection, row) for row in rows]
        compared = [
            _compared(reader, connection, row, brief.rounds_done, (kind, name), axis, points)
            for row, brief in zip(rows, briefs, strict=True)
        ]
        available = sorted(
            {f"{end.kind}/{end.name}" for run in runs for end in series.series_ends(connection, run)}
        )
        x, aligned = _aligned(compared)
        table = [
            _table_line(connection, brief, each, name, target)
            for brief, each in zip(briefs, compared, strict=True)
        ]
    return Comparison(
        kind=kind,  # type: ignore[arg-type]
        name=name,
        higher_is_better=series.higher_is_better(name),
        axis=axis,
        target=target,
        x=x.tolist(),
        series=aligned,
        table=table,
        available=available + [f"round/{each}" for each in series.ROUND_SERIES],
    )


def config_diff(reader: StoreReader, left: str, right: str) -> ConfigDiff:
    """Return what two runs were told differently. Raises `UnknownRun`."""
    with reader.connect() as connection:
        one, other = (_flat(find_run(connection, run).config) for run in (left, right))
    differences = [
        Difference(
            path=path,
            left=one.get(path),
            right=other.get(path),
            has_left=path in one,
            has_right=path in other,
        )
        for path in sorted(one.keys() | other.keys())
        if path not in one or path not in other or one[path] != other[path]
    ]
    return ConfigDiff(
        left=left,
        right=right,
        same=len(one.keys() | other.keys()) - len(differences),
        differences=differences,
    )


def _compared(
    reader: StoreReader,
    connection: Connection,
    row: Any,
    done: int,
    metric: tuple[str, str],
    axis: Axis,
    points: int,
) -> _Compared:
    cost = reader.memo.get(("clock", row.id), version_of(row, done), lambda: clock(connection, row.id))
    whole = series.points(connection, row.id, *metric)
    drawn = downsampled(whole, points)
    x = drawn.rounds.astype(np.float64) if axis == "round" else cost.at(drawn.rounds, axis)
    placed = np.isfinite(x)  # Where nobody counts bytes, nothing can be drawn over them.
    drawn = Points(drawn.rounds[placed], drawn.values[placed])
    return _Compared(row.id, whole, drawn, x[placed], cost)


def _aligned(compared: list[_Compared]) -> tuple[NDArray, list[ComparedSeries]]:
    """Return the common axis, all x that any run has, and every run's values there."""
    x = np.unique(np.concatenate([each.x for each in compared])) if compared else np.empty(0)
    found = []
    for each in compared:
        values = np.full(len(x), np.nan)
        values[np.searchsorted(x, each.x)] = each.drawn.values
        found.append(
            ComparedSeries(
                run=each.run,
                values=values.tolist(),
                total=len(each.whole.rounds),
                exact=len(each.drawn.rounds) == len(each.whole.rounds),
            )
        )
    return x, found


def _table_line(
    connection: Connection, brief: Any, each: _Compared, name: str, target: float | None
) -> ComparedRun:
    values, rounds = each.whole.values, each.whole.rounds
    known = np.flatnonzero(np.isfinite(values))
    grows = series.higher_is_better(name)
    best = known[(values[known] if grows else -values[known]).argmax()] if len(known) else None
    sums = connection.execute(
        select(
            func.avg(RoundRow.participants), func.sum(RoundRow.sent_bytes), func.sum(RoundRow.received_bytes)
        ).where(RoundRow.run_id == each.run)
    ).one()
    reached = None
    if target is not None and len(known):
        there = known[values[known] >= target] if grows else known[values[known] <= target]
        reached = int(rounds[there[0]]) if len(there) else None
    where = None if reached is None else np.array([reached])
    seconds = each.clock.seconds
    return ComparedRun(
        run=brief,
        last=float(values[-1]) if len(values) else None,
        last_round=int(rounds[-1]) if len(rounds) else None,
        best=None if best is None else float(values[best]),
        best_round=None if best is None else int(rounds[best]),
        seconds=float(seconds[-1]) if len(seconds) else 0.0,
        participants_mean=None if sums[0] is None else float(sums[0]),
        sent_bytes=None if sums[1] is None else int(sums[1]),
        received_bytes=None if sums[2] is None else int(sums[2]),
        rounds_to_target=reached,
        seconds_to_target=None if where is None else float(each.clock.at(where)[0]),
        bytes_to_target=None if where is None else float(each.clock.at(where, "bytes")[0]),
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted paths; lists are leaves."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: finite(value)} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
