"""The last taken reply of every client of a run: what it reported of itself."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, bindparam, select

from turnout.dashboard.queries.client_numbers import ClientNumbers
from turnout.server.schema import ClientRoundRow

_KEPT_RUNS: Final = 8
_AT_ONCE: Final = 500
# With the round and the clients given, every row is one look-up by the primary key.
_REPLIES: Final = select(ClientRoundRow.__table__).where(
    ClientRoundRow.run_id == bindparam("run"),
    ClientRoundRow.round == bindparam("number"),
    ClientRoundRow.client.in_(bindparam("clients", expanding=True)),
)


@dataclass(frozen=True)
class Reply:
    """One taken reply; None for what was not reported."""

    round: int
    num_examples: int
    train_loss: float | None
    train_seconds: float | None
    update_norm: float | None
    metrics: Mapping[str, float]


class LastReplies:
    """The last replies in the runs looked at last; only those that changed are read again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _OfRun] = OrderedDict()

    def of(
        self, connection: Connection, run: str, generation: int, numbers: ClientNumbers
    ) -> dict[int, Reply]:
        """Return the last taken reply by client. ``generation``: see `Activity`."""
        with self._lock:
            known = self._known.get(run)
            if known is None or known.generation != generation:
                known = self._known[run] = _OfRun(generation)
            self._known.move_to_end(run)
            while len(self._known) > _KEPT_RUNS:
                self._known.popitem(last=False)
            replies = dict(known.replies)
        wanted = {
            int(client): int(last)
            for client, last in zip(numbers.clients, numbers.last_round, strict=True)
            if last
        }
        stale: dict[int, list[int]] = {}
        for client, last in wanted.items():
            if client not in replies or replies[client].round != last:
                stale.setdefault(last, []).append(client)
        for last, clients in stale.items():
            for start in range(0, len(clients), _AT_ONCE):
                replies |= _read(connection, run, last, clients[start : start + _AT_ONCE])
        with self._lock:
            known.replies |= replies
        return {client: replies[client] for client in wanted if client in replies}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()


@dataclass
class _OfRun:
    generation: int
    replies: dict[int, Reply] = field(default_factory=dict)


def numbers_only(metrics: Any) -> dict[str, float]:
    """Return what of a stored JSON object is a number."""
    if not isinstance(metrics, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _read(connection: Connection, run: str, number: int, clients: list[int]) -> dict[int, Reply]:
    rows = connection.execute(_REPLIES, {"run": run, "number": number, "clients": clients})
    return {
        row.client: Reply(
            round=row.round,
            num_examples=row.num_examples,
            train_loss=row.train_loss,
            train_seconds=row.train_seconds,
            update_norm=row.update_norm,
            metrics=numbers_only(row.metrics),
        )
        for row in rows
    }
