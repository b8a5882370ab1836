"""The weighted mean over all clients of their stored vectors, kept up to date in O(participants)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from turnout.strategies.exact_sum import ExactSum, peak
from turnout.strategies.memory import open_memory
from turnout.wire.errors import CheckpointError

# Incremental updates round once per round; recomputing from the memory now and then undoes the drift.
REBASE_EVERY = 200


class MemoryMean:
    """``sum_j a_j h_j`` over the stored vectors h_j, where a_j is the weight a client last came with.

    `store` during a round leaves `total` as it was when the round began; `commit` takes the changes over.
    """

    def __init__(self, like: Any, memory: str) -> None:
        """Store vectors shaped as ``like`` in a memory of this kind (see `open_memory`)."""
        self.kind = memory.partition(":")[0]
        self.memory = open_memory(memory)
        self.weights: dict[int, float] = {}
        self._peaks: dict[int, float] = {}
        self._like = like
        self._change = ExactSum(like)
        self.total = self._change.value()

    def __len__(self) -> int:
        """Return how many clients have a stored vector."""
        return len(self.memory)

    def get(self, client: int) -> Any | None:
        """Return the client's stored vector, or None."""
        return self.memory.get(client)

    def peak(self, client: int) -> float:
        """Return a bound on the stored vector's absolute values, which spares a pass over it."""
        return self._peaks[client]

    def begin_round(self) -> None:
        """Open a round."""
        self._change.reset()

    def store(self, client: int, vector: Any, weight: float = 1.0, *, largest: float | None = None) -> None:
        """Replace the client's vector; the old one must not be used afterwards.

        ``largest`` is the vector's `peak` when the caller has it; no memory rounds a value beyond it.
        """
        largest = peak(vector) if largest is None else largest
        old = self.memory.get(client)
        if old is not None:
            self._change.add(old, -self.weights[client], largest=self._peaks[client])
        self._change.add(self.memory.put(client, vector), weight, largest=largest)
        self.weights[client], self._peaks[client] = weight, largest

    def commit(self, server_round: int) -> None:
        """Take the round's changes over into ``total``."""
        if server_round % REBASE_EVERY == 0:
            self.total = self.recomputed()
        else:
            self.total = self.total + self._change.value()

    def recomputed(self) -> Any:
        """Return the weighted sum computed afresh from the memory."""
        fresh = ExactSum(self._like)
        for client in self.memory.keys():  # noqa: SIM118 - not a dict
            fresh.add(self.memory.get(client), self.weights[client], largest=self._peaks[client])
        return fresh.value()

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""
        return self.memory.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Return memory, weights and running total."""
        clients = sorted(self.weights)
        return {
            "kind": self.kind,
            "memory": self.memory.state_dict(),
            "clients": np.array(clients, np.int64),
            "weights": np.array([self.weights[client] for client in clients], np.float64),
            "peaks": np.array([self._peaks[client] for client in clients], np.float64),
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
        clients = tree["clients"].tolist()
        self.weights = dict(zip(clients, tree["weights"].tolist(), strict=True))
        self._peaks = dict(zip(clients, tree["peaks"].tolist(), strict=True))
        self.total = np.array(tree["total"])
