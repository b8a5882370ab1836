"""Who is registered: stable client identities, examples, and when each was last seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnout.wire.errors import ReplyRejected


@dataclass(slots=True)
class ClientEntry:
    """One registered client. ``client`` is None until a reply has named it; rounds are 0 for never."""

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
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        #: More clients than those registered may exist: the engine names only those present.
        self.growing = False
        self.entries: dict[int, ClientEntry] = {}
        self._by_node: dict[int, int] = {}
        self._by_client: dict[int, int] = {}
        self._next = 0
        self._last: range | None = None
        self._known_examples = 0
        self._known = 0

    def __len__(self) -> int:
        """Return N: the declared number of clients, or how many were ever registered."""
        return len(self.entries) if self.capacity is None else self.capacity

    def register(self, nodes: Iterable[int], server_round: int) -> list[int]:
        """Enter nodes not seen before and return their rows."""
        if isinstance(nodes, range):
            if nodes == self._last:
                return []  # The usual case, without a pass over every client.
            self._last = nodes
        return [self._enter(node, server_round) for node in nodes if node not in self._by_node]

    def row_of_node(self, node: int) -> int:
        """Return the row that ``node`` stands for."""
        return self._by_node[node]

    def identify(self, node: int, client: int, server_round: int) -> int:
        """Return the row of ``client``, whose reply came from ``node``.

        Raises `ReplyRejected` when the declared number of clients is exhausted by others.
        """
        own = self._by_node.get(node)
        provisional = own if own is not None and self.entries[own].client is None else None
        row = self._by_client.get(client)
        if row is None:
            if self.capacity is not None and len(self._by_client) >= self.capacity:
                raise ReplyRejected(
                    "unknown-client",
                    f"client-id {client} is unknown and all num_clients={self.capacity} clients are known.",
                )
            row = self._enter(node, server_round) if provisional is None else provisional
            self.entries[row].client = client
            self._by_client[client] = row
        elif provisional is not None:
            del self.entries[provisional]
        self._by_node[node] = row
        return row

    def seen(self, row: int, server_round: int, examples: int) -> int:
        """Record an accepted reply; return the staleness: rounds since the one before, 0 for the first."""
        entry = self.entries[row]
        staleness = server_round - entry.last_seen if entry.last_seen else 0
        entry.last_seen = server_round
        self._known_examples += examples - entry.examples
        self._known += entry.examples == 0
        entry.examples = examples
        return staleness

    def total_examples(self) -> float:
        """Return the examples of all N clients; those not heard of count as the mean of the others."""
        return self._known_examples / self._known * len(self) if self._known else float(len(self))

    def state_dict(self) -> dict[str, Any]:
        """Return the register as integer arrays."""
        rows = [
            [row, e.registered, e.last_seen, e.examples, e.client is not None, (e.client or 0) < 0]
            for row, e in self.entries.items()
        ]
        return {
            "rows": np.array(rows, np.int64).reshape(-1, 6),
            # Node ids, and so the ids of clients that name none, are unsigned 64-bit numbers in Flower.
            "row_clients": np.array([(e.client or 0) % 2**64 for e in self.entries.values()], np.uint64),
            "row_nodes": np.array([e.node for e in self.entries.values()], np.uint64),
            "nodes": np.array(list(self._by_node), np.uint64),
            "node_rows": np.array(list(self._by_node.values()), np.int64),
            "next": self._next,
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the register with that of `state_dict`."""
        ids = zip(tree["row_clients"].tolist(), tree["row_nodes"].tolist(), strict=True)
        self.entries = {
            row: ClientEntry(node, client - 2**64 * negative if named else None, registered, last, examples)
            for (row, registered, last, examples, named, negative), (client, node) in zip(
                tree["rows"].tolist(), ids, strict=True
            )
        }
        self._by_node = dict(zip(tree["nodes"].tolist(), tree["node_rows"].tolist(), strict=True))
        self._by_client = {e.client: row for row, e in self.entries.items() if e.client is not None}
        self._next, self._last = int(tree["next"]), None
        self._known = sum(e.examples > 0 for e in self.entries.values())
        self._known_examples = sum(e.examples for e in self.entries.values())

    def _enter(self, node: int, server_round: int) -> int:
        row, self._next = self._next, self._next + 1
        self.entries[row] = ClientEntry(node, None, server_round)
        self._by_node[node] = row
        return row
