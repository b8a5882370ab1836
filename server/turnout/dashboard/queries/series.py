"""Series over the rounds: which a run has, their ends, and their points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, literal, select, tuple_

from turnout.server.schema import MetricRow, RoundRow
from turnout.wire import NDArray

#: Pseudo-series of the kind "round": columns of the rounds' table.
ROUND_SERIES: Final = (
    "participants", "invited", "failed", "rejected", "missing", "select-seconds", "train-seconds",
    "fold-seconds", "finish-seconds", "evaluate-seconds", "checkpoint-seconds", "sent-bytes",
    "received-bytes",
)  # fmt: skip
MOST_SERIES: Final = 1_000
_HIGHER: Final = ("accuracy", "auc", "f1", "r2", "precision", "recall", "score")


@dataclass(frozen=True)
class Points:
    """Rounds and values (NaN for not-a-number) of one series."""

    rounds: NDArray
    values: NDArray


def higher_is_better(name: str) -> bool:
    """Return whether a metric of this name should grow."""
    return any(part in name.lower() for part in _HIGHER)


def of_series(run: str, kind: str, name: str) -> ColumnElement[bool]:
    """Return the condition for one series; the primary key starts like this."""
    return and_(MetricRow.run_id == run, MetricRow.kind == kind, MetricRow.name == name)


def series_names(connection: Connection, run: str, kind: str | None = None) -> list[tuple[str, str]]:
    """Return (kind, name) of every series, at most 1,000; jumps from name to name along the primary key."""
    found: list[tuple[str, str]] = []
    within = MetricRow.run_id == run
    if kind is not None:
        within = and_(within, MetricRow.kind == kind)
    query = (
        select(MetricRow.kind, MetricRow.name).where(within).order_by(MetricRow.kind, MetricRow.name).limit(1)
    )
    here = connection.execute(query).first()
    while here is not None and len(found) < MOST_SERIES:
        found.append((here[0], here[1]))
        beyond = tuple_(MetricRow.kind, MetricRow.name) > tuple_(literal(here[0]), literal(here[1]))
        here = connection.execute(query.where(beyond)).first()
    return found


def last_point(connection: Connection, run: str, kind: str, name: str) -> tuple[int, float | None] | None:
    """Return the newest (round, value) of a series."""
    query = select(MetricRow.round, MetricRow.value).where(of_series(run, kind, name))
    row = connection.execute(query.order_by(MetricRow.round.desc()).limit(1)).first()
    return None if row is None else (row[0], row[1])


def best_point(connection: Connection, run: str, kind: str, name: str) -> tuple[int, float | None] | None:
    """Return the (round, value) that is best, the first of them; None when no value is a number."""
    value: ColumnElement[float | None] = (
        MetricRow.value.desc() if higher_is_better(name) else MetricRow.value.asc()
    )
    query = select(MetricRow.round, MetricRow.value).where(
        of_series(run, kind, name), MetricRow.value.is_not(None)
    )
    row = connection.execute(query.order_by(value, MetricRow.round).limit(1)).first()
    return None if row is None else (row[0], row[1])


def points(connection: Connection, run: str, kind: str, name: str) -> Points:
    """Return all points of a series."""
    if kind == "round":
        column = RoundRow.__table__.c[name.replace("-", "_")]
        query = select(RoundRow.round, column).where(RoundRow.run_id == run).order_by(RoundRow.round)
    else:
        query = select(MetricRow.round, MetricRow.value).where(of_series(run, kind, name))
        query = query.order_by(MetricRow.round)
    return as_points(connection.execute(query).tuples())


def as_points(rows: Iterable[tuple[int, float | None]]) -> Points:
    """Return (round, value or None) pairs as arrays."""
    pairs = list(rows)
    rounds = np.array([pair[0] for pair in pairs], dtype=np.int64)
    values = np.array([math.nan if pair[1] is None else pair[1] for pair in pairs], dtype=np.float64)
    return Points(rounds, values)


def sample(
    connection: Connection, run: str, kind: str, name: str, rounds: Sequence[int]
) -> list[float | None]:
    """Return the value at or before each of ``rounds``; one look-up each, however long the series is."""
    values: list[float | None] = []
    query = (
        select(MetricRow.value).where(of_series(run, kind, name)).order_by(MetricRow.round.desc()).limit(1)
    )
    for number in rounds:
        row = connection.execute(query.where(MetricRow.round <= number)).first()
        values.append(None if row is None else row[0])
    return values


def first_points(
    connection: Connection, run: str, kind: str, name: str, limit: int
) -> list[tuple[int, float | None]]:
    """Return the first (round, value) pairs of a series."""
    query = select(MetricRow.round, MetricRow.value).where(of_series(run, kind, name))
    return [(row[0], row[1]) for row in connection.execute(query.order_by(MetricRow.round).limit(limit))]


def metrics_between(
    connection: Connection, run: str, first: int, last: int
) -> dict[int, dict[str, dict[str, float | None]]]:
    """Return the metrics of the rounds ``first`` to ``last`` by round, kind and name."""
    found: dict[int, dict[str, dict[str, float | None]]] = {}
    for kind, name in series_names(connection, run):
        query = select(MetricRow.round, MetricRow.value).where(
            of_series(run, kind, name), MetricRow.round.between(first, last)
        )
        for number, value in connection.execute(query):
            kinds = found.setdefault(number, {"train": {}, "evaluate": {}, "diagnostics": {}})
            if kind in kinds:
                kinds[kind][name] = value
    return found
