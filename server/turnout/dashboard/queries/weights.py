"""How much weight every client was given in all: added up in the database, then kept up with the run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
from sqlalchemy import Connection, bindparam, func, select

from turnout.dashboard.queries.activity import Activity
from turnout.dashboard.reader import StoreReader
from turnout.server.schema import ClientRoundRow
from turnout.wire import NDArray

_KEPT_RUNS: Final = 8
_SUMS: Final = (
    select(ClientRoundRow.client, func.sum(ClientRoundRow.weight))
    .where(
        ClientRoundRow.run_id == bindparam("run"),
        ClientRoundRow.round > bindparam("after"),
        ClientRoundRow.round <= bindparam("last"),
        ClientRoundRow.outcome == "ok",
    )
    .group_by(ClientRoundRow.client)
)


@dataclass(frozen=True)
class _Known:
    """Sums by client over the rounds up to ``last``."""

    generation: int
    last: int
    sums: dict[int, float]


class Weights:
    """The weights in the runs looked at last; only rounds that are new are read again."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def of(self, connection: Connection, run: str, activity: Activity) -> NDArray:
        """Return the sum of every client's weights, in the order of ``activity.clients``."""
        done, generation = activity.rounds_done, activity.generation
        with self._lock:
            known = self._known.get(run)
        if known is None or known.generation != generation or known.last > done:
            known = _Known(generation, 0, {})
        if known.last < done:
            sums = dict(known.sums)
            rows = self._reader.in_halves(connection, known.last, done, lambda *span: _read(run, *span))
            for client, weight in rows:
                sums[client] = sums.get(client, 0.0) + (weight or 0.0)
            known = _Known(generation, done, sums)
            with self._lock:
                self._known[run] = known
                self._known.move_to_end(run)
                while len(self._known) > _KEPT_RUNS:
                    self._known.popitem(last=False)
        return np.array([known.sums.get(client, 0.0) for client in activity.clients.tolist()])

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()


def _read(run: str, connection: Connection, after: int, last: int) -> list[tuple[int, float | None]]:
    rows = connection.execute(_SUMS, {"run": run, "after": after, "last": last})
    return [(row[0], row[1]) for row in rows]
