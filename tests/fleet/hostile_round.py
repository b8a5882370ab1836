"""A FedAvg round that tests run beside clients which speak the protocol by hand."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.strategies import FedAvg
from turnout.wire import as_array


class Round:
    """One FedAvg round over honest and hostile raw clients, run in a thread."""

    def __init__(self, server: FleetServer, clients: int, size: int, rounds: int = 1, **start: Any) -> None:
        self.grid = FleetGrid(server, min_clients=clients, wait=10)
        self.strategy = FedAvg()
        vector = np.zeros(size, np.float32)
        self._arrays = ArrayRecord({"w": as_array(vector[: size // 2]), "b": as_array(vector[size // 2 :])})
        self._start = {"num_rounds": rounds, "timeout": 20, "callbacks": [CommitCallback(self.grid)], **start}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: BaseException | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            self.strategy.start(self.grid, self._arrays, **self._start)
        except BaseException as error:
            self.error = error

    def result(self) -> dict[int, tuple[str, str]]:
        self._thread.join(25)
        assert not self._thread.is_alive()
        assert self.error is None
        return {report.client: (report.outcome, report.reason) for report in self.strategy.reports}
