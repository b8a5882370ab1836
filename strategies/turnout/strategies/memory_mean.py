"""The weighted mean over all clients of their stored vectors, kept up to date in O(participants)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from turnout.strategies.exact_sum import ExactSum, peak
from turnout.strategies.memory import open_memory
from turnout.wire.columns import Column
from turnout.wire.errors import CheckpointError

# Incremental updates round once per round; recomputing from the memory undoes the drift. It reads every
# stored vector, so it waits until each has been replaced this often on average: a small part of that work,
# however few of the clients take part in a round.
REBASE_EVERY = 200


class MemoryMean:
    """``sum_j a_j h_j`` over the stored vectors h_j, where a_j is the weight a client last came with.

    `store` during a round leaves `total` as it was when the round began; `commit` takes the changes over.
    """

    def __init__(self, like: Any, memory: str) -> None:
        """Store vectors shaped as ``like`` in a memory of this kind (see `open_memory`)."""
        self.kind = memory.partition(":")[0]
        self.memory = open_memory(memory)
        # By client; only those of clients with a stored vector mean anything.
        self._weights = Column(np.float64, 1.0)
        self._peaks = Column(np.float64)
        self._read: tuple[int, Any] | None = None
        self._stores = 0
        self._like = like
        self._change = ExactSum(like)
        self.total = self._change.value()

    def __len__(self) -> int:
        """Return how many clients have a stored vector."""
        return len(self.memory)

    def get(self, client: int) -> Any | None:
        """Return the client's stored vector, or None."""
        vector = self.memory.get(client)
        # Who looks at a client's vector is about to replace it, which needs it again.
        self._read = (client, vector)
        return vector

    def peak(self, client: int) -> float:
        """Return a bound on the stored vector's absolute values, which spares a pass over it."""
        return float(self._peaks[client])

    def weight(self, client: int) -> float:
        """Return the weight that the client's stored vector has."""
        return float(self._weights[client])

    def begin_round(self) -> None:
        """Open a round."""
        self._change.reset()

    def expect(self, clients: Iterable[int]) -> None:
        """Say who will probably take part, so that their vectors are at hand."""
        self.memory.expect(clients)

    def store(self, client: int, vector: Any, weight: float = 1.0, *, largest: float | None = None) -> None:
        """Replace the client's vector; the old one must not be used afterwards.

        ``largest`` is the vector's `peak` when the caller has it; no memory rounds a value beyond it.
        """
        largest = peak(vector) if largest is None else largest
        read, self._read = self._read, None
        old = read[1] if read is not None and read[0] == client else self.memory.get(client)
        if old is not None:
            self._change.add(old, -self.weight(client), largest=self.peak(client))
        del read, old
        self._change.add(self.memory.put(client, vector), weight, largest=largest)
        self._weights.reach(client + 1)
        self._peaks.reach(client + 1)
        self._weights[client], self._peaks[client] = weight, largest
        self._stores += 1

    def commit(self) -> None:
        """Take the round's changes over into ``total``."""
        self._read = None
        if self._stores >= REBASE_EVERY * max(1, len(self.memory)):
            self.total = self.recomputed()
            self._stores = 0
        else:
            self.total = self.total + self._change.value()

    def recomputed(self) -> Any:
        """Return the weighted sum computed afresh from the memory."""
        fresh = ExactSum(self._like)
        for client in self.memory.keys():  # noqa: SIM118 - not a dict
            fresh.add(self.memory.get(client), self.weight(client), largest=self.peak(client))
        return fresh.value()

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""
        return self.memory.nbytes

    def keep_in(self, directory: Path, name: str, run: str) -> None:
        """Let checkpoints refer to the vectors; see `ClientMemory.keep_in`."""
        self.memory.keep_in(directory, name, run)

    def state_dict(self) -> dict[str, Any]:
        """Return memory, weights and running total."""
        return {
            "kind": self.kind,
            "memory": self.memory.state_dict(),
            "weights": self._weights.state_dict(),
            "peaks": self._peaks.state_dict(),
            "stores": self._stores,
            "total": np.asarray(self.total),
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the content with that of `state_dict`.

        Raises `CheckpointError` when it is of another kind of memory.
        """
        if tree["kind"] != self.kind:
            raise CheckpointError(
                f"checkpoint holds a memory of kind {tree['kind']!r}, this run has memory={self.kind!r}; "
                "resume with the kind it was made with."
            )
        self.memory.load_state_dict(tree["memory"])
        self._weights.load_state_dict(tree["weights"])
        self._peaks.load_state_dict(tree["peaks"])
        self._stores, self._read = int(tree["stores"]), None
        self.total = np.array(tree["total"])
