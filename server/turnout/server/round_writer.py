"""Writes one round's rows: statements made once, since a round of a simulation may take milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Table, bindparam, delete, insert, update

from turnout.server.schema import Base, ClientRoundRow, ClientRow, MetricRow, RoundRow, RunRow

MetricKind: TypeAlias = Literal["train", "evaluate", "diagnostics"]


def _table(row: type[Base]) -> Table:
    return Base.metadata.tables[row.__tablename__]


_RUNS: Final = _table(RunRow)
_ROUNDS: Final = _table(RoundRow)
_CLIENTS: Final = _table(ClientRow)
_ADD_ROUND: Final = insert(_ROUNDS)
_ADD_METRICS: Final = insert(_table(MetricRow))
_ADD_OUTCOMES: Final = insert(_table(ClientRoundRow))
_ADD_CLIENTS: Final = insert(_CLIENTS)
_DROP_CLIENTS: Final = delete(_CLIENTS).where(
    _CLIENTS.c.run_id == bindparam("of_run"), _CLIENTS.c.client == bindparam("of_client")
)
_TOUCH_RUN: Final = (
    update(_RUNS)
    .where(_RUNS.c.id == bindparam("of_run"))
    .values(heartbeat_at=bindparam("now"), seconds=bindparam("spent"))
)
_FORGET_CHECKPOINTS: Final = (
    update(_ROUNDS)
    .where(
        _ROUNDS.c.run_id == bindparam("of_run"),
        _ROUNDS.c.round < bindparam("oldest"),
        _ROUNDS.c.checkpoint.is_not(None),
    )
    .values(checkpoint=None)
)


def write_round(
    connection: Connection,
    row: RoundRow,
    metrics: Mapping[MetricKind, Mapping[str, float]],
    clients: Iterable[Mapping[str, Any]],
    *,
    seconds: float,
    oldest_checkpoint: int | None,
    members: Iterable[Mapping[str, Any]],
) -> None:
    """Write what `RunStore.commit_round` says, within the transaction of ``connection``."""
    run = row.run_id
    connection.execute(_ADD_ROUND, {column.key: getattr(row, column.key) for column in _ROUNDS.columns})
    if numbers := metric_rows(run, row.round, metrics):
        connection.execute(_ADD_METRICS, numbers)
    if outcomes := [{"run_id": run, "round": row.round, **client} for client in clients]:
        connection.execute(_ADD_OUTCOMES, outcomes)
    if entries := [{"run_id": run, "updated_at": row.committed_at, **member} for member in members]:
        connection.execute(_DROP_CLIENTS, [{"of_run": run, "of_client": e["client"]} for e in entries])
        connection.execute(_ADD_CLIENTS, entries)
    connection.execute(_TOUCH_RUN, {"of_run": run, "now": row.committed_at, "spent": seconds})
    if oldest_checkpoint is not None:
        connection.execute(_FORGET_CHECKPOINTS, {"of_run": run, "oldest": oldest_checkpoint})


def metric_rows(
    run_id: str, round_number: int, metrics: Mapping[MetricKind, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Return the rows of a round's numbers."""
    return [
        {
            "run_id": run_id,
            "round": round_number,
            "kind": kind,
            "name": name,
            # SQLite would store NaN as NULL on its own; said here so that every database does the same.
            "value": None if math.isnan(value) else float(value),
        }
        for kind, values in metrics.items()
        for name, value in values.items()
    ]
