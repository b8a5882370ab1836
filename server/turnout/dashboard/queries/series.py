"""Series over the rounds: which a run has, their ends, and their points.

The metrics' primary key is run, kind, name, round, so every question here is a few look-ups, however many
rows there are. Statements are built once: building one costs more than SQLite needs to answer it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from sqlalchemy import (
    CTE,
    Connection,
    Integer,
    Select,
    and_,
    bindparam,
    func,
    literal,
    select,
)

from turnout.server.schema import MetricRow, RoundRow
from turnout.wire import NDArray

#: Pseudo-series of the kind "round": columns of the rounds' table.
ROUND_SERIES: Final = (
    "participants", "invited", "failed", "rejected", "missing", "select-seconds", "train-seconds",
    "fold-seconds", "finish-seconds", "evaluate-seconds", "checkpoint-seconds", "sent-bytes",
    "received-bytes",
)  # fmt: skip
KINDS: Final = ("diagnostics", "evaluate", "train")
MOST_SERIES: Final = 1_000
_HIGHER: Final = ("accuracy", "auc", "f1", "r2", "precision", "recall", "score")

_OF_KIND: Final = and_(MetricRow.run_id == bindparam("run"), MetricRow.kind == bindparam("kind"))
_OF_SERIES: Final = and_(_OF_KIND, MetricRow.name == bindparam("name"))
_POINTS: Final = select(MetricRow.round, MetricRow.value).where(_OF_SERIES).order_by(MetricRow.round)
_HEAD: Final = _POINTS.limit(bindparam("most"))
_KNOWN: Final = select(MetricRow.round, MetricRow.value).where(_OF_SERIES, MetricRow.value.is_not(None))
_HIGHEST: Final = _KNOWN.order_by(MetricRow.value.desc(), MetricRow.round).limit(1)
_LOWEST: Final = _KNOWN.order_by(MetricRow.value.asc(), MetricRow.round).limit(1)
_LAST: Final = (
    select(MetricRow.round, MetricRow.value).where(_OF_SERIES).order_by(MetricRow.round.desc()).limit(1)
)


def _names() -> CTE:
    """Return the names of one kind: from each the smallest one beyond it, which is one look-up."""
    names = select(func.min(MetricRow.name).label("name")).where(_OF_KIND).cte("names", recursive=True)
    beyond = select(func.min(MetricRow.name)).where(_OF_KIND, MetricRow.name > names.c.name)
    return names.union_all(select(beyond.scalar_subquery()).where(names.c.name.is_not(None)))


def _ends() -> Any:
    names = _names()
    newest = select(MetricRow).where(_OF_KIND, MetricRow.name == names.c.name)
    newest = newest.order_by(MetricRow.round.desc())
    ends = [newest.with_only_columns(column).limit(1) for column in (MetricRow.round, MetricRow.value)]
    found = select(names.c.name, *(end.scalar_subquery() for end in ends))
    return found.where(names.c.name.is_not(None)).limit(MOST_SERIES)


def _between() -> Any:
    names = _names()
    rounds = MetricRow.round.between(bindparam("first"), bindparam("last"))
    on = and_(_OF_KIND, MetricRow.name == names.c.name, rounds)
    found = select(MetricRow.name, MetricRow.round, MetricRow.value)
    return found.select_from(names).join(MetricRow, on).where(names.c.name.is_not(None))


def _evenly() -> Select[Any]:
    """Return the value at or before each of ``steps`` + 1 evenly spaced rounds."""
    steps, first, last = (bindparam(name, type_=Integer) for name in ("steps", "first", "last"))
    step = select(literal(0).label("step")).cte("step", recursive=True)
    step = step.union_all(select(step.c.step + 1).where(step.c.step < steps))
    number = first + (last - first) * step.c.step // steps
    value = select(MetricRow.value).where(_OF_SERIES, MetricRow.round <= number)
    newest = value.order_by(MetricRow.round.desc()).limit(1).correlate(step).scalar_subquery()
    return select(newest).select_from(step).order_by(step.c.step)


_ENDS: Final = _ends()
_BETWEEN: Final = _between()
_EVENLY: Final = _evenly()


@dataclass(frozen=True)
class Points:
    """Rounds and values (NaN for not-a-number) of one series."""

    rounds: NDArray
    values: NDArray


def higher_is_better(name: str) -> bool:
    """Return whether a metric of this name should grow."""
    return any(part in name.lower() for part in _HIGHER)


@dataclass(frozen=True)
class End:
    """The newest point of one series."""

    kind: str
    name: str
    round: int
    value: float | None


def series_ends(connection: Connection, run: str) -> list[End]:
    """Return every series of a run with its newest point; of each kind at most 1,000."""
    return [
        End(kind, *row) for kind in KINDS for row in connection.execute(_ENDS, {"run": run, "kind": kind})
    ]


def last_point(connection: Connection, run: str, kind: str, name: str) -> tuple[int, float | None] | None:
    """Return the newest (round, value) of a series."""
    return _first(connection, _LAST, run, kind, name)


def best_point(connection: Connection, run: str, kind: str, name: str) -> tuple[int, float | None] | None:
    """Return the (round, value) that is best, the first of them; None when no value is a number."""
    return _first(connection, _HIGHEST if higher_is_better(name) else _LOWEST, run, kind, name)


def points(connection: Connection, run: str, kind: str, name: str) -> Points:
    """Return all points of a series; none for one that the run has not."""
    if kind != "round":
        return as_points(connection.execute(_POINTS, {"run": run, "kind": kind, "name": name}))
    if name not in ROUND_SERIES:
        return as_points(())
    column = RoundRow.__table__.c[name.replace("-", "_")]
    query = select(RoundRow.round, column).where(RoundRow.run_id == run).order_by(RoundRow.round)
    return as_points(connection.execute(query))


def as_points(rows: Iterable[tuple[int, float | None]]) -> Points:
    """Return (round, value or None) pairs as arrays."""
    pairs = list(rows)
    rounds = np.array([pair[0] for pair in pairs], dtype=np.int64)
    values = np.array([math.nan if pair[1] is None else pair[1] for pair in pairs], dtype=np.float64)
    return Points(rounds, values)


def outline(connection: Connection, run: str, kind: str, name: str, most: int) -> list[float | None]:
    """Return a series' values, if they are at most ``most``; else what it was at so many spaced rounds."""
    keys = {"run": run, "kind": kind, "name": name}
    head = connection.execute(_HEAD, keys | {"most": most + 1}).all()
    last = last_point(connection, run, kind, name)
    if len(head) <= most or last is None:
        return [value for _, value in head]
    span = {"first": head[0][0], "last": last[0], "steps": most - 1}
    return [row[0] for row in connection.execute(_EVENLY, keys | span)]


def metrics_between(
    connection: Connection, run: str, first: int, last: int
) -> dict[int, dict[str, dict[str, float | None]]]:
    """Return the metrics of the rounds ``first`` to ``last`` by round, kind and name."""
    found: dict[int, dict[str, dict[str, float | None]]] = {}
    for kind in KINDS:
        keys = {"run": run, "kind": kind, "first": first, "last": last}
        for name, number, value in connection.execute(_BETWEEN, keys):
            kinds = found.setdefault(number, {each: {} for each in KINDS})
            kinds[kind][name] = value
    return found


def _first(
    connection: Connection, query: Select[int, float | None], run: str, kind: str, name: str
) -> tuple[int, float | None] | None:
    row = connection.execute(query, {"run": run, "kind": kind, "name": name}).first()
    return None if row is None else (row[0], row[1])
