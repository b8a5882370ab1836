"""The activities of the runs that are looked at: read once, then kept up with the runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, Row, func, select

from turnout.dashboard.memo import Memo
from turnout.dashboard.queries.activity import Activity, Columns, packed
from turnout.dashboard.queries.client_numbers import ClientNumbers, client_numbers
from turnout.dashboard.queries.runs import rounds_done
from turnout.dashboard.queries.weights import Weights
from turnout.dashboard.reader import StoreReader
from turnout.server.schema import ClientRow, EventRow
from turnout.wire import NDArray

_KEPT_RUNS: Final = 8
_KEPT_INVITATIONS: Final = 10_000_000


@dataclass(frozen=True)
class _Known:
    columns: Columns
    activity: Activity


class Activities:
    """The activities of the runs looked at last: at most eight, of at most 10 million invitations in all."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._numbers = Memo(_KEPT_RUNS)
        self._weights = Weights(reader)

    def of(self, connection: Connection, run: Row[Any]) -> Activity:
        """Return the activity of ``run`` as ``connection`` sees it now."""
        with self._lock:
            loading = self._loading.setdefault(run.id, threading.Lock())
        with loading:
            return self._load(connection, run)

    def numbers(self, connection: Connection, run: str, activity: Activity) -> ClientNumbers:
        """Return the numbers of the clients of ``activity``."""
        version = activity.generation, activity.rounds_done, len(activity.clients)

        def compute() -> ClientNumbers:
            return client_numbers(activity, self._weights.of(connection, run, activity))

        return self._numbers.get(run, version, compute)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()
        self._numbers.clear()
        self._weights.clear()

    def _load(self, connection: Connection, run: Row[Any]) -> Activity:
        done, generation = rounds_done(connection, run.id), _generation(connection, run.id)
        with self._lock:
            known = self._known.get(run.id)
        if known is not None and known.activity.generation != generation:
            known = None
        columns = known.columns if known is not None else Columns()
        if columns.last < done:
            rows = self._reader.in_halves(connection, columns.last, done, lambda *span: packed(run.id, *span))
            columns = columns.extended(rows, done)
        clients = _all_clients(connection, run, columns)
        if (
            known is not None
            and known.activity.rounds_done == done
            and len(known.activity.clients) == len(clients)
        ):
            return known.activity
        activity = columns.activity(clients, done, generation)
        # A reader whose transaction began before the last commit must not put its older view in place.
        if (known is None or known.activity.rounds_done < done) and self._is_current(run.id, generation):
            with self._lock:
                self._known[run.id] = _Known(columns, activity)
                self._known.move_to_end(run.id)
                self._forget()
        return activity

    def _is_current(self, run: str, generation: int) -> bool:
        with self._reader.connect() as connection:
            return _generation(connection, run) == generation

    def _forget(self) -> None:
        held = sum(len(known.columns.round) for known in self._known.values())
        while len(self._known) > 1 and (len(self._known) > _KEPT_RUNS or held > _KEPT_INVITATIONS):
            run, known = self._known.popitem(last=False)
            self._loading.pop(run, None)
            held -= len(known.columns.round)


def _generation(connection: Connection, run: str) -> int:
    query = select(func.max(EventRow.id)).where(EventRow.run_id == run, EventRow.kind == "resumed")
    return connection.execute(query).scalar() or 0


def _all_clients(connection: Connection, run: Row[Any], columns: Columns) -> NDArray:
    enrolled = [
        row[0] for row in connection.execute(select(ClientRow.client).where(ClientRow.run_id == run.id))
    ]
    seen = np.union1d(columns.seen, np.array(enrolled, dtype=np.uint64))
    if seen.size and int(seen[-1]) >= run.num_clients:
        return seen
    return np.arange(run.num_clients, dtype=np.uint64)
