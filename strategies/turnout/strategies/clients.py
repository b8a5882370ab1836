"""Who is registered: stable client identities, examples, and when each was last seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import filterfalse
from typing import Any, Final

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.columns import Column
from turnout.wire.errors import ReplyRejected

# Ids are unsigned 64-bit numbers where they are nodes', signed ones where a client names itself: the column
# has the lower 64 bits, the flag tells which.
_NAMED: Final = 1
_NEGATIVE: Final = 2
_DROPPED: Final = 4
_COLUMNS: Final = {
    "node": np.uint64, "client": np.uint64, "flags": np.uint8, "registered": np.int64, "last_seen": np.int64,
    "examples": np.int64, "nodes": np.uint64, "node_rows": np.int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClientEntry:
    """One registered client; ``client`` is None until a reply has named it; rounds are 0 for never."""

    node: int
    client: int | None
    registered: int
    last_seen: int = 0
    examples: int = 0

    @property
    def key(self) -> int:
        """The id to show: the client's own, else its node's."""
        return self.node if self.client is None else self.client


class ClientRegistry:
    """Maps node ids (the engine's, which may change on reconnect) to clients (stable) and small row numbers.

    A node counts as a client of its own until its reply carries a ``client-id``; if that client is known from
    an earlier node, the two are the same client and the provisional entry is dropped.

    What is known about clients is kept in columns, one number per row, so that a round costs what its
    participants cost, however many are registered.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        #: More clients than those registered may exist: the engine names only those present.
        self.growing = False
        self._columns = {name: Column(dtype) for name, dtype in _COLUMNS.items()}
        self._node, self._client, self._flags = (self._columns[n] for n in ("node", "client", "flags"))
        self._registered, self._last_seen = self._columns["registered"], self._columns["last_seen"]
        self._examples = self._columns["examples"]
        # Every node ever seen and its row; the index finds a node's place in these two.
        self._nodes, self._node_rows = self._columns["nodes"], self._columns["node_rows"]
        self._index: dict[int, int] = {}
        self._by_client: dict[int, int] = {}
        self._dropped = 0
        self._last: range | tuple[int, ...] | None = None
        self._known_examples = 0
        self._known = 0

    def __len__(self) -> int:
        """Return N: the declared number of clients, or how many were ever registered."""
        return self.registered if self.capacity is None else self.capacity

    @property
    def registered(self) -> int:
        """How many clients were ever registered, whatever number was declared."""
        return len(self._node) - self._dropped

    @property
    def entries(self) -> Mapping[int, ClientEntry]:
        """The registered clients by row, read from the columns when asked for."""
        return _Entries(self)

    def key(self, row: int) -> int:
        """Return the id to show of the client in ``row``: its own, else its node's."""
        flags = self._flags[row]
        if not flags & _NAMED:
            return int(self._node[row])
        return int(self._client[row]) - (2**64 if flags & _NEGATIVE else 0)

    def last_seen(self, row: int) -> int:
        """Return the round of the last accepted reply of the client in ``row``, 0 for never."""
        return int(self._last_seen[row])

    def longest_absence(self, server_round: int) -> int:
        """Return the rounds since the client that has been away longest took part (all of them if never)."""
        seen = self._last_seen.values
        if self._dropped:
            seen = seen[(self._flags.values & _DROPPED) == 0]
        return server_round - int(seen.min()) if len(seen) else 0

    def register(self, nodes: Iterable[int], server_round: int) -> range:
        """Enter nodes not seen before and return their rows.

        A range or a tuple is not looked through again when it comes a second time.
        """
        if isinstance(nodes, (range, tuple)):
            if nodes is self._last or (isinstance(nodes, range) and nodes == self._last):
                return range(0)
            self._last = nodes
        new: Iterable[int] = nodes
        if self._index or not isinstance(nodes, range):
            new = dict.fromkeys(filterfalse(self._index.__contains__, nodes))
        return self._enter_all(new, server_round)

    def row_of_node(self, node: int) -> int:
        """Return the row that ``node`` stands for."""
        return int(self._node_rows[self._index[node]])

    def rows_of(self, nodes: Iterable[int]) -> Iterator[int]:
        """Yield the rows that ``nodes`` stand for."""
        return map(self.row_of_node, nodes)

    def identify(self, node: int, client: int, server_round: int) -> int:
        """Return the row of ``client``, whose reply came from ``node``.

        Raises `ReplyRejected` when the declared number of clients is exhausted by others.
        """
        place = self._index.get(node)
        own = None if place is None else int(self._node_rows[place])
        provisional = own if own is not None and not self._flags[own] & _NAMED else None
        row = self._by_client.get(client)
        if row is None:
            if self.capacity is not None and len(self._by_client) >= self.capacity:
                raise ReplyRejected(
                    "unknown-client",
                    f"client-id {client} is unknown and all num_clients={self.capacity} clients are known.",
                )
            row = self._enter(node, server_round) if provisional is None else provisional
            self._client[row] = client % 2**64
            self._flags[row] = _NAMED | (_NEGATIVE if client < 0 else 0)
            self._by_client[client] = row
        elif provisional is not None:
            self._flags[provisional] = _DROPPED
            self._dropped += 1
        self._point(node, row)
        return row

    def seen(self, row: int, server_round: int, examples: int) -> int:
        """Record an accepted reply; return the staleness: rounds since the one before, 0 for the first."""
        last, before = self._last_seen[row], self._examples[row]
        self._last_seen[row], self._examples[row] = server_round, examples
        self._known_examples += examples - before
        self._known += before == 0
        return server_round - last if last else 0

    def total_examples(self) -> float:
        """Return the examples of all N clients; those not heard of count as the mean of the others."""
        return self._known_examples / self._known * len(self) if self._known else float(len(self))

    def state_dict(self) -> dict[str, Any]:
        """Return the register's columns in their short form."""
        return {name: column.state_dict() for name, column in self._columns.items()}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the register with that of `state_dict`."""
        for name, column in self._columns.items():
            column.load_state_dict(tree[name])
        self._index = dict(zip(self._nodes.values.tolist(), range(len(self._nodes)), strict=True))
        flags = self._flags.values
        named = np.flatnonzero(flags & _NAMED)
        self._by_client = {self.key(row): row for row in named.tolist()}
        self._dropped = int(np.count_nonzero(flags & _DROPPED))
        self._last = None
        self._known = int(np.count_nonzero(self._examples.values))
        self._known_examples = int(self._examples.values.sum())

    def _enter(self, node: int, server_round: int) -> int:
        return self._enter_all((node,), server_round)[0]

    def _enter_all(self, nodes: Iterable[int], server_round: int) -> range:
        """Give each of ``nodes`` a new row."""
        ids = np.fromiter(nodes, np.uint64)
        rows = range(len(self._node), len(self._node) + len(ids))
        for column in (
            self._node,
            self._client,
            self._flags,
            self._registered,
            self._last_seen,
            self._examples,
        ):
            column.reach(rows.stop)
        self._node[rows.start :] = ids
        self._registered[rows.start :] = server_round
        if len(ids) == 1:
            self._point(int(ids[0]), rows[0])
        elif len(ids):
            places = range(len(self._nodes), len(self._nodes) + len(ids))
            self._nodes.reach(places.stop)
            self._node_rows.reach(places.stop)
            self._nodes[places.start :] = ids
            self._node_rows[places.start :] = _numbers(rows)
            self._index.update(zip(ids.tolist(), places, strict=True))
        return rows

    def _point(self, node: int, row: int) -> None:
        """Let ``node`` stand for ``row``."""
        place = self._index.get(node)
        if place is None:
            self._index[node] = self._nodes.append(node)
            self._node_rows.append(row)
        else:
            self._node_rows[place] = row

    def _entry(self, row: int) -> ClientEntry:
        named = self._flags[row] & _NAMED
        return ClientEntry(
            int(self._node[row]),
            self.key(row) if named else None,
            int(self._registered[row]),
            int(self._last_seen[row]),
            int(self._examples[row]),
        )


class _Entries(Mapping[int, ClientEntry]):
    """A register's clients by row, without an object for each that nobody asked about."""

    def __init__(self, registry: ClientRegistry) -> None:
        self._registry = registry

    def __len__(self) -> int:
        return self._registry.registered

    def __iter__(self) -> Iterator[int]:
        flags = self._registry._flags.values
        return iter(np.flatnonzero((flags & _DROPPED) == 0).tolist())

    def __getitem__(self, row: int) -> ClientEntry:
        flags = self._registry._flags
        if not 0 <= row < len(flags) or flags[row] & _DROPPED:
            raise KeyError(row)
        return self._registry._entry(row)


def _numbers(rows: range) -> NDArray:
    return np.arange(rows.start, rows.stop, dtype=np.int64)
