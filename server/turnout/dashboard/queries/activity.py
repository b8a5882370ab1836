"""Who was invited when, and what came of it: a run's invitations as arrays, which grow with the run.

A million invitations are read as a few thousand texts, one per round, outcome and role, along an index that
has all of it; only rounds that are new are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, Row, Text, bindparam, cast, func, select

from turnout.server.history import OUTCOMES
from turnout.server.schema import ClientRoundRow
from turnout.wire import NDArray

OK: Final = OUTCOMES.index("ok")
FAILED: Final = OUTCOMES.index("failed")
REJECTED: Final = OUTCOMES.index("rejected")
MISSING: Final = OUTCOMES.index("missing")

_MOST_ROLES: Final = 15
_GROUPS: Final = (ClientRoundRow.round, ClientRoundRow.outcome, ClientRoundRow.role)
_PACKED: Final = (
    select(*_GROUPS, func.aggregate_strings(cast(ClientRoundRow.client, Text), ",").label("clients"))
    .where(
        ClientRoundRow.run_id == bindparam("run"),
        ClientRoundRow.round > bindparam("after"),
        ClientRoundRow.round <= bindparam("last"),
    )
    .group_by(*_GROUPS)
    .order_by(*_GROUPS)
)
_COUNTED_IDS: Final = 1 << 22


@dataclass(frozen=True)
class Activity:
    """One entry per invitation, by round: ``round``, ``client`` (its index in ``clients``), ``outcome`` (see
    `OUTCOMES`) and ``role`` (index into ``roles`` plus one; 0 for roles beyond the fifteenth).

    ``clients`` has all ids in ascending order: 0 to N-1, or those that were ever seen. ``generation``
    changes when rounds are dropped and computed again: it is the last resumption's event.
    """

    generation: int
    rounds_done: int
    clients: NDArray
    round: NDArray
    client: NDArray
    outcome: NDArray
    role: NDArray
    roles: tuple[str, ...]

    def index_of(self, client: int) -> int | None:
        """Return where ``client`` is in ``clients``."""
        place = int(np.searchsorted(self.clients, np.uint64(client)))
        return place if place < len(self.clients) and int(self.clients[place]) == client else None


@dataclass(frozen=True)
class Columns:
    """What was read so far: rounds up to ``last``. ``ids`` are clients' ids, not yet indices, and ``seen``
    each of them once, in order.
    """

    last: int = 0
    round: NDArray = field(default_factory=partial(np.empty, 0, np.int32))
    ids: NDArray = field(default_factory=partial(np.empty, 0, np.uint64))
    outcome: NDArray = field(default_factory=partial(np.empty, 0, np.uint8))
    role: NDArray = field(default_factory=partial(np.empty, 0, np.uint8))
    seen: NDArray = field(default_factory=partial(np.empty, 0, np.uint64))
    roles: tuple[str, ...] = ()

    def extended(self, rows: Sequence[Row[Any]], last: int) -> Columns:
        """Return this with ``rows``, which are the `packed` ones of the rounds from here to ``last``."""
        roles = list(self.roles)
        for row in rows:
            if row.role not in roles and len(roles) < _MOST_ROLES:
                roles.append(row.role)
        counts = np.array([row.clients.count(",") + 1 for row in rows], dtype=np.int64)
        ids = _numbers([row.clients for row in rows])

        def spread(values: list[int], kind: type[np.generic]) -> NDArray:
            return np.repeat(np.array(values, dtype=kind), counts)

        outcomes = [OUTCOMES.index(row.outcome) if row.outcome in OUTCOMES else REJECTED for row in rows]
        numbers = [roles.index(row.role) + 1 if row.role in roles else 0 for row in rows]
        return Columns(
            last=last,
            round=np.concatenate((self.round, spread([row.round for row in rows], np.int32))),
            ids=np.concatenate((self.ids, ids.astype(np.uint64))),
            seen=np.union1d(self.seen, _distinct(ids.astype(np.uint64))),
            outcome=np.concatenate((self.outcome, spread(outcomes, np.uint8))),
            role=np.concatenate((self.role, spread(numbers, np.uint8))),
            roles=tuple(roles),
        )

    def activity(self, clients: NDArray, done: int, generation: int) -> Activity:
        """Return what `Activity` has, up to the round ``done``."""
        stop = int(np.searchsorted(self.round, done, side="right"))
        ids = self.ids[:stop]
        counted = not len(clients) or int(clients[-1]) == len(clients) - 1
        places = ids if counted else np.searchsorted(clients, ids)
        return Activity(
            generation=generation,
            rounds_done=done,
            clients=clients,
            round=self.round[:stop],
            client=places.astype(np.int32),
            outcome=self.outcome[:stop],
            role=self.role[:stop],
            roles=self.roles,
        )


def _distinct(ids: NDArray) -> NDArray:
    """Return every id once; ids are mostly small numbers, for which counting is faster than sorting."""
    if len(ids) and int(ids.max()) < _COUNTED_IDS:
        return np.flatnonzero(np.bincount(ids.astype(np.int64))).astype(np.uint64)
    return np.unique(ids)


def packed(run: str, connection: Connection, after: int, last: int) -> list[Row[Any]]:
    """Return one row per round (after ``after``), outcome and role, with the clients as one text."""
    return list(connection.execute(_PACKED, {"run": run, "after": after, "last": last}))


def _numbers(texts: list[str]) -> NDArray:
    """Return the numbers of comma-separated texts, one text after the other."""
    return np.fromstring(",".join(texts), dtype=np.int64, sep=",") if texts else np.empty(0, np.int64)
