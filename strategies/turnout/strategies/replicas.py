"""Which round each EGGROLL client's replica stands at, and what brings it to the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from turnout.strategies.rounds import Instruction
from turnout.strategies.update_log import UpdateLog
from turnout.wire import NDArray, keys
from turnout.wire.replica import MOMENTS, Replica
from turnout.wire.seed_log import LogEntry


class Replicas:
    """The clients' replicas, by client row, and the log of rounds as long as it is smaller than the model.

    ``known_start``: clients build the model ``start``, that of round 1, themselves.
    """

    def __init__(self, start: Replica, *, known_start: bool) -> None:
        self._log = UpdateLog((1 + len(start.moments)) * start.theta.nbytes)
        self._rounds: dict[int, int] = {}
        self._theta = start.theta
        self._start_checksum = start.checksum()
        self._unknown = 1 if known_start else None
        self.models_sent = 0
        """Clients that were sent the model in this round."""

    @property
    def nbytes(self) -> int:
        """What the log takes on the wire."""
        return self._log.nbytes

    def begin_round(self, theta: NDArray) -> None:
        """Open a round; a model ``theta`` that somebody else put in place is one that no client holds."""
        if theta is not self._theta:
            self._log.clear()
            self._rounds.clear()
            self._theta = theta
        self.models_sent = 0

    def known_since(self, row: int, server_round: int) -> int | None:
        """Return the round from which on a client needs the log; None when it needs the model."""
        since = self._rounds.get(row, self._unknown)
        if since is None or self._log.since(since, server_round) is None:
            self.models_sent += 1
            return None
        return since

    def bring(self, told: Instruction, since: int | None, server_round: int, moments: NDArray) -> None:
        """Add to a request what a client lacks that is at the start of round ``since``."""
        told.model = since is None
        if since is None:
            told.vectors = dict(zip(MOMENTS, moments, strict=False))
            return
        log = self._log.since(since, server_round)
        assert log is not None
        told.records[keys.SEED_LOG] = log
        if since == 1:
            told.config[keys.START_CHECKSUM] = self._start_checksum

    def answered(self, row: int, server_round: int, *, resync: bool) -> None:
        """Note that a client is at the start of ``server_round``, or that it has no model."""
        self._rounds[row] = 0 if resync else server_round

    def moved(self, server_round: int, weights: NDArray, after: Replica, *, checked: bool) -> None:
        """Log the round by which the model became ``after``."""
        checksum = after.checksum() if checked else None
        self._log.append(LogEntry(server_round, weights, after.steps, checksum))
        self._theta = after.theta

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as a few arrays."""
        rows, rounds = (np.array(list(part), np.int64) for part in (self._rounds, self._rounds.values()))
        return {
            "log": self._log.state_dict(),
            "rows": rows,
            "rounds": rounds,
            "start_checksum": self._start_checksum,
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace all with that of `state_dict`."""
        self._log.load_state_dict(tree["log"])
        self._rounds = dict(zip(tree["rows"].tolist(), tree["rounds"].tolist(), strict=True))
        self._start_checksum = int(tree["start_checksum"])

    def adopt(self, theta: NDArray) -> None:
        """Take ``theta`` as the model that the log leads to: it was loaded together with it."""
        self._theta = theta
