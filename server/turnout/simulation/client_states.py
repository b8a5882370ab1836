"""What the clients of a simulation keep between rounds: in memory up to a bound, and in files of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from turnout.simulation.state_files import StateFiles
from turnout.wire.errors import CheckpointError
from turnout.wire.flower import LazyArray, records_of
from turnout.wire.record_tree import decode_records, encode_records


class ClientStates:
    """One state per client that has any.

    States beyond ``most_bytes`` (of arrays) are written to files, those not used for longest first, when
    `trim` is called. `keep_in` names a place for files that checkpoints then refer to: a checkpoint
    costs the states that have changed since the one before. May be used by several threads, for different
    clients.
    """

    def __init__(self, num_clients: int, most_bytes: int) -> None:
        self._num_clients = num_clients
        self._most_bytes = most_bytes
        self._held: dict[int, RecordDict] = {}  # Last used last.
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._files: StateFiles | None = None
        self._changed: set[int] = set()  # Held states of which the files have no copy.
        self._kept = False
        self._lock = threading.Lock()

    def get(self, node: int) -> RecordDict:
        """Return the client's state; an empty one, which nobody keeps, if it has none."""
        with self._lock:
            state = self._held.pop(node, None)
            if state is not None:
                self._held[node] = state
            elif self._stored(node):
                self._hold(node, state := self._read(node))
            return RecordDict() if state is None else state

    def put(self, node: int, state: RecordDict) -> None:
        """Make ``state`` the client's; the very object that `get` returned may have been changed."""
        with self._lock:
            held = self._held.pop(node, None)
            if held is None and not state and not self._stored(node):
                return
            self._hold(node, state)
            if held is None or held is state or not _same(held, state):
                self._changed.add(node)

    def move(self, node: int, state: RecordDict) -> None:
        """Make ``state``, which is equal to the client's in other memory, the client's."""
        with self._lock:
            self._held.pop(node, None)
            self._hold(node, state)

    @property
    def exceeds(self) -> bool:
        """Whether there is more in memory than there should be."""
        return self._bytes > self._most_bytes

    def trim(self) -> list[int]:
        """Let go of states in memory until the rest fits, and return whose."""
        dropped = []
        with self._lock:
            while self._bytes > self._most_bytes:
                node = next(iter(self._held))
                if self._files is None:
                    self._files = StateFiles()
                if node in self._changed:
                    self._files.put(node, self._held[node])
                    self._changed.remove(node)
                del self._held[node]
                self._bytes -= self._sizes.pop(node)
                dropped.append(node)
        return dropped

    def keep_in(self, directory: Path) -> None:
        """Let checkpoints refer to files in ``directory``, to which changed states are written for each."""
        before = self._files
        if self._kept and before is not None and before.directory == directory:
            return
        self._files, self._kept = StateFiles(directory), True
        if before is not None:
            self._files.copy_from(before)

    def state_dict(self) -> dict[str, Any]:
        """Return the states by client, arrays shared, or references to the files that they are kept in."""
        if self._kept and self._files is not None:
            for node in sorted(self._changed):
                self._files.put(node, self._held[node])
            self._changed.clear()
            return {"rows": self._files.references()}
        states = dict(self._held)
        if self._files is not None:
            states |= {node: self._read(node) for node in self._files.nodes() if node not in states}
        return {str(node): encode_records(states[node]) for node in sorted(states) if states[node]}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace every client's state; raises `CheckpointError` for clients that do not exist here."""
        rows = tree.get("rows")
        states: dict[int, RecordDict] = {}
        files = None
        if isinstance(rows, Mapping):
            files = StateFiles.reopen(rows)
            self._check(files.nodes())
        else:
            states = {int(node): decode_records(state) for node, state in tree.items()}
            self._check(states)
        self._held.clear()
        self._sizes.clear()
        self._bytes = 0
        self._files, self._kept = files, files is not None and files.directory is not None
        for node, state in states.items():
            self._hold(node, state)
        self._changed = set(states)

    def _stored(self, node: int) -> bool:
        return self._files is not None and node in self._files

    def _read(self, node: int) -> RecordDict:
        return RecordDict() if self._files is None else self._files.get(node)

    def _hold(self, node: int, state: RecordDict) -> None:
        self._held[node] = state
        size = _nbytes(state)
        self._bytes += size - self._sizes.get(node, 0)
        self._sizes[node] = size

    def _check(self, nodes: Iterable[int]) -> None:
        strangers = [node for node in nodes if not 0 <= node < self._num_clients]
        if strangers:
            raise CheckpointError(
                f"the checkpoint holds the state of client {min(strangers)}, but this grid has clients 0 to "
                f"{self._num_clients - 1}; resume with the number of clients that the run had."
            )


def _nbytes(state: RecordDict) -> int:
    return sum(
        array.ndarray.nbytes if isinstance(array, LazyArray) else len(array.data)
        for record in records_of(state, ArrayRecord).values()
        for array in record.values()
    )


def _same(one: RecordDict, other: RecordDict) -> bool:
    """Return whether both hold the very same values; what is equal but new counts as another."""
    if list(one) != list(other):
        return False
    for mine, theirs in zip(one.values(), other.values(), strict=True):
        if type(mine) is not type(theirs) or list(mine) != list(theirs):
            return False
        if any(a is not b for a, b in zip(mine.values(), theirs.values(), strict=True)):
            return False
    return True
