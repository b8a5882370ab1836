"""EGGROLL over the fleet: a node is killed, its replicas survive or are sent again, the model is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_node import app

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.simulation import LocalGrid
from turnout.strategies import EGGROLL, Callback
from turnout.tasks import Digits

KEPT, LOST = 2, 4
"""Rounds after which the node is killed: its state stays the first time, and is gone the second."""


class Models(Callback):
    """The model after each round."""

    def __init__(self) -> None:
        self.models: list[bytes] = []

    def on_round_end(self, report: Any) -> None:
        self.models.append(report.strategy.x.tobytes())


class Replacing(CommitCallback):
    """Runs ``replace`` with the name of the state to go on with; notes who had no say, and got the model."""

    def __init__(self, grid: FleetGrid, replace: Callable[[str], None]) -> None:
        super().__init__(grid)
        self._replace = replace
        self.absent: list[set[int]] = []
        self.whole: list[float] = []

    def on_round_end(self, report: Any) -> None:
        super().on_round_end(report)
        assert all(client.outcome == "ok" for client in report.clients)
        self.absent.append({client.client for client in report.clients if client.weight == 0.0})
        self.whole.append(report.diagnostics["checkpoints-sent"])
        if report.server_round in (KEPT, LOST):
            self._replace("a" if report.server_round == KEPT else "empty")


def strategy() -> EGGROLL:
    return EGGROLL(num_clients=8, pairs=2, mode="disjoint")


def test_a_killed_node_goes_on_from_its_replicas_or_asks_for_the_model(
    spawn: Callable[..., Any], tmp_path: Path
) -> None:
    model = Digits(num_clients=8, model="softmax", alpha=0.5, seed=1).initial_arrays()
    served = Models()
    with FleetServer(num_clients=8, run_config={"seed": 0}, options=FleetOptions(reconnect=60)) as server:
        nodes = [spawn("torch_node.py", server.address, "0-2", "a", tmp_path / "a")]
        spawn("torch_node.py", server.address, "3-7", "b", tmp_path / "b")
        grid = FleetGrid(server, min_clients=8, wait=60)

        def replace(state: str) -> None:
            nodes.pop().kill()
            nodes.append(spawn("torch_node.py", server.address, "0-2", "a", tmp_path / state))

        watch = Replacing(grid, replace)
        strategy().start(grid, model, num_rounds=6, timeout=60, callbacks=[watch, served])
    assert watch.absent == [set()] * LOST + [{0, 1, 2}, set()]
    assert watch.whole == [0.0] * 5 + [3.0]
    simulated = Models()
    strategy().start(LocalGrid(app(0.0), 8, executor="serial"), model, num_rounds=LOST, callbacks=[simulated])
    assert served.models[:LOST] == simulated.models
