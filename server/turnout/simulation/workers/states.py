"""The clients' states in shared memory: where each one's arrays lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict

from turnout.simulation.clients import LocalClients
from turnout.simulation.workers.parcels import Entry, entries, place
from turnout.simulation.workers.pool import WorkerPool


class SharedStates:
    """Keeps what `LocalClients` holds and what workers see the same, without copying arrays."""

    def __init__(self, clients: LocalClients, pool: WorkerPool) -> None:
        self._clients = clients
        self._pool = pool
        # The wrapped tree of each client's state, and the very content that it describes.
        self._known: dict[int, tuple[list[Any], RecordDict]] = {}

    def tree(self, node: int) -> list[Any]:
        """Return the client's state as a wrapped tree; arrays that lie elsewhere are copied once."""
        state = self._clients.state(node)
        tree, content = self._known.get(node, ([], None))
        if state is content:
            return tree
        self._release(tree, [])
        if not state:
            self._known.pop(node, None)
            return []
        self._keep(node, self._pool.parcels.wrap(state))
        return self._known[node][0]

    def replace(self, node: int, tree: list[Any]) -> None:
        """Make ``tree``, which came from a worker, the client's state; release blocks no longer in it."""
        old, _ = self._known.get(node, ([], None))
        if tree == old:
            return
        self._keep(node, tree)
        self._release(old, tree)

    def forget(self) -> None:
        """Release everything: the states were replaced from outside."""
        for tree, _ in self._known.values():
            self._release(tree, [])
        self._known.clear()

    def _keep(self, node: int, tree: list[Any]) -> None:
        content, _ = self._pool.parcels.unwrap(tree)
        self._clients.keep(node, content)
        self._known[node] = (tree, content)

    def _release(self, old: list[Any], new: list[Any]) -> None:
        for entry in superseded(old, new):
            self._pool.release(entry)


def superseded(old: list[Any], new: list[Any]) -> list[Entry]:
    """Return the entries of the wrapped tree ``old`` whose blocks ``new`` does not use any more."""
    used: Mapping[tuple[int, ...], None] = dict.fromkeys(place(entry) for entry in entries(new))
    return [entry for entry in entries(old) if place(entry) not in used]
