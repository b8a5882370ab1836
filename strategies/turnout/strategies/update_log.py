"""The rounds of an EGGROLL run as weights of pairs, as long as they take less than the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from turnout.wire import NDArray
from turnout.wire.seed_log import LogEntry, log_record


class UpdateLog:
    """The newest rounds; never more bytes of them than ``limit``, what a checkpoint takes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: deque[LogEntry] = deque()
        self._bytes = 0
        self._records: dict[int, ArrayRecord] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """What the kept rounds take on the wire."""
        return self._bytes

    def append(self, entry: LogEntry) -> None:
        """Add the round that follows the last one."""
        self._entries.append(entry)
        self._bytes += entry.num_bytes
        while self._bytes > self.limit:
            self._bytes -= self._entries.popleft().num_bytes
        self._records.clear()

    def clear(self) -> None:
        """Forget all rounds: the model is no longer what they lead to."""
        self._entries.clear()
        self._records.clear()
        self._bytes = 0

    def since(self, server_round: int, now: int) -> ArrayRecord | None:
        """Return the rounds from ``server_round`` up to the one before ``now``; None when one is not kept.

        The same record for all who ask in one round.
        """
        if now - server_round > len(self._entries) or server_round > now:
            return None
        if server_round not in self._records:
            first = len(self._entries) - (now - server_round)
            self._records[server_round] = log_record(list(self._entries)[first:])
        return self._records[server_round]

    def state_dict(self) -> dict[str, Any]:
        """Return the kept rounds as a few arrays."""
        entries = self._entries
        checksums = [-1 if entry.checksum is None else entry.checksum for entry in entries]
        return {
            "rounds": _whole([entry.server_round for entry in entries]),
            "counts": _whole([len(entry.weights) for entry in entries]),
            "steps": _whole([entry.steps for entry in entries]),
            "checksums": _whole(checksums),
            "weights": np.concatenate([np.empty(0, np.float32), *(entry.weights for entry in entries)]),
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Go back to the rounds of `state_dict`."""
        self.clear()
        weights, end = np.array(tree["weights"]), 0
        columns = (tree[name].tolist() for name in ("rounds", "counts", "steps", "checksums"))
        for server_round, count, steps, checksum in zip(*columns, strict=True):
            piece, end = weights[end : end + count], end + count
            self.append(LogEntry(server_round, piece, steps, None if checksum < 0 else checksum))


def _whole(values: list[int]) -> NDArray:
    return np.array(values, np.int64)
