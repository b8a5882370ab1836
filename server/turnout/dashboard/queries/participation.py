"""The participation matrix as bytes: clients by rounds, whole or as an overview."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from turnout.dashboard.models.rounds import ParticipationLayout
from turnout.dashboard.queries.activities import Activities
from turnout.dashboard.queries.activity import FAILED, MISSING, OK, REJECTED, Activity
from turnout.dashboard.queries.client_numbers import ClientNumbers
from turnout.dashboard.queries.runs import find_run
from turnout.dashboard.reader import StoreReader
from turnout.server.history import OUTCOMES
from turnout.wire import NDArray

RowOrder = Literal["client", "participation", "last-round", "weight", "staleness", "failures"]
_SHARE: Final = 255
_BY_SEVERITY: Final = (OK, MISSING, FAILED, REJECTED)


@dataclass(frozen=True)
class Window:
    """Part of the matrix: rounds and rows are counted from 1 and 0, both ends included; None for the end."""

    first_round: int = 1
    last_round: int | None = None
    first_client: int = 0
    last_client: int | None = None


@dataclass(frozen=True)
class Matrix:
    """A window of the matrix: how it is laid out, and what its bytes are made of."""

    layout: ParticipationLayout
    activity: Activity
    places: NDArray
    rows: int
    columns: int

    def body(self) -> bytes:
        """Return the bytes that ``layout`` describes."""
        if self.layout.planes == 1:
            return _exact(self.activity, self.places, self.rows, self.columns, self.layout.first_round)
        steps = self.layout.row_step, self.layout.column_step
        return _overview(self.activity, self.places, self.rows, self.columns, self.layout.first_round, *steps)


def participation(
    reader: StoreReader,
    activities: Activities,
    run: str,
    window: Window,
    *,
    most_rows: int,
    most_columns: int,
    order: RowOrder,
    descending: bool,
) -> Matrix:
    """Return a window of a run's matrix. Raises `UnknownRun`."""
    with reader.connect() as connection:
        activity = activities.of(connection, find_run(connection, run))
        keys = np.arange(len(activity.clients))
        if order != "client":
            keys = _keys(activities.numbers(connection, run, activity), order)
    ranked = np.argsort(-keys if descending else keys, kind="stable")
    total_rounds, total_clients = activity.rounds_done, len(activity.clients)
    first_round = max(window.first_round, 1)
    last_round = total_rounds if window.last_round is None else min(window.last_round, total_rounds)
    first = window.first_client
    last = total_clients - 1 if window.last_client is None else min(window.last_client, total_clients - 1)
    rows, columns = max(last - first + 1, 0), max(last_round - first_round + 1, 0)
    if rows == 0 or columns == 0:
        rows = columns = 0
    row_step, column_step = -(-rows // most_rows) or 1, -(-columns // most_columns) or 1
    shown = ranked[first : first + rows]
    places = np.full(total_clients, -1, dtype=np.int32)
    places[shown] = np.arange(len(shown), dtype=np.int32)
    layout = ParticipationLayout(
        rows=-(-rows // row_step),
        columns=-(-columns // column_step),
        planes=2 if row_step > 1 or column_step > 1 else 1,
        row_step=row_step,
        column_step=column_step,
        first_round=first_round,
        last_round=first_round + columns - 1,
        first_client=first,
        total_rounds=total_rounds,
        total_clients=total_clients,
        outcomes=list(OUTCOMES),
        roles=["", *activity.roles],
        clients=[str(client) for client in activity.clients[shown[::row_step]]],
    )
    return Matrix(layout, activity, places, rows, columns)


def _keys(numbers: ClientNumbers, order: RowOrder) -> NDArray:
    """Return what rows are sorted by; equal ones stay in the order of their ids."""
    return {
        "participation": numbers.seen,
        "last-round": numbers.last_round,
        "weight": np.nan_to_num(numbers.mean_weight),
        "staleness": numbers.staleness,
        "failures": numbers.failed + numbers.rejected + numbers.missing,
    }[order]


def _inside(
    activity: Activity, places: NDArray, columns: int, first_round: int
) -> tuple[NDArray, NDArray, slice, NDArray]:
    """Return row and column of every invitation in the window, and which ones these are."""
    start, stop = np.searchsorted(activity.round, (first_round, first_round + columns))
    part = slice(int(start), int(stop))
    row = places[activity.client[part]]
    kept = row >= 0
    return row[kept], activity.round[part][kept] - first_round, part, kept


def _exact(activity: Activity, places: NDArray, rows: int, columns: int, first_round: int) -> bytes:
    row, column, part, kept = _inside(activity, places, columns, first_round)
    cells = np.zeros((rows, columns), dtype=np.uint8)
    cells[row, column] = activity.outcome[part][kept] + 16 * activity.role[part][kept]
    return cells.tobytes()


def _overview(
    activity: Activity,
    places: NDArray,
    rows: int,
    columns: int,
    first_round: int,
    row_step: int,
    column_step: int,
) -> bytes:
    row, column, part, kept = _inside(activity, places, columns, first_round)
    height, width = -(-rows // row_step), -(-columns // column_step)
    block = (row // row_step).astype(np.int64) * width + column // column_step
    outcome = activity.outcome[part][kept]
    taken = np.bincount(block[outcome == OK], minlength=height * width)
    covered = np.outer(_sizes(rows, row_step), _sizes(columns, column_step)).ravel()
    # Rounded up: whoever took part at all is never drawn as absent.
    share = np.ceil(_SHARE * taken / np.maximum(covered, 1)).astype(np.uint8)
    worst = np.zeros(height * width, dtype=np.uint8)
    for code in _BY_SEVERITY:
        worst[block[outcome == code]] = code
    return bytes(share.tobytes() + worst.tobytes())


def _sizes(total: int, step: int) -> NDArray:
    """Return how many lines each block has: ``step``, and what is left in the last."""
    count = -(-total // step)
    sizes = np.full(count, step, dtype=np.int64)
    if count:
        sizes[-1] = total - step * (count - 1)
    return sizes
