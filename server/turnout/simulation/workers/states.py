"""The clients' states in shared memory: where each one's arrays lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import RecordDict

from turnout.simulation.client_states import ClientStates
from turnout.simulation.workers.parcels import Entry, entries, place
from turnout.simulation.workers.pool import WorkerPool


class SharedStates:
    """Keeps what `ClientStates` holds and what workers see the same, without copying arrays."""

    def __init__(self, states: ClientStates, pool: WorkerPool) -> None:
        self._states = states
        self._pool = pool
        # The wrapped tree of each client's state, and the very content that it describes.
        self._known: dict[int, tuple[list[Any], RecordDict]] = {}

    def tree(self, node: int) -> list[Any]:
        """Return the client's state as a wrapped tree; arrays that lie elsewhere are copied once."""
        state = self._states.get(node)
        tree, content = self._known.get(node, ([], None))
        if state is content:
            return tree
        if tree:
            self._release(tree, [])
        if not state:
            self._known.pop(node, None)
            return []
        tree = self._pool.parcels.wrap(state)
        self._states.move(node, self._know(node, tree))
        return tree

    def replace(self, node: int, tree: list[Any]) -> None:
        """Make ``tree``, which came from a worker, the client's state; release blocks no longer in it."""
        old, _ = self._known.get(node, ([], None))
        if tree == old:
            return
        self._states.put(node, self._know(node, tree))
        self._release(old, tree)

    def forget(self, nodes: Iterable[int] | None = None) -> None:
        """Release the blocks of ``nodes`` (None: all): their states are elsewhere; no worker runs them."""
        for node in list(self._known) if nodes is None else nodes:
            tree, _ = self._known.pop(node, ([], None))
            self._release(tree, [])

    def _know(self, node: int, tree: list[Any]) -> RecordDict:
        content, _ = self._pool.parcels.unwrap(tree)
        self._known[node] = (tree, content)
        return content

    def _release(self, old: list[Any], new: list[Any]) -> None:
        for entry in superseded(old, new):
            self._pool.release(entry)


def superseded(old: list[Any], new: list[Any]) -> list[Entry]:
    """Return the entries of the wrapped tree ``old`` whose blocks ``new`` does not use any more."""
    used: Mapping[tuple[int, ...], None] = dict.fromkeys(place(entry) for entry in entries(new))
    return [entry for entry in entries(old) if place(entry) not in used]
