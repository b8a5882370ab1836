"""EGGROLL over the fleet: processes are killed, replicas survive or are sent again, the model is the same."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet_commands import Turnout, free_port, simulated

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import EGGROLL
from turnout.tasks import Digits

CHOSEN = ("strategy.name=eggroll", "strategy.mode=disjoint", "run.rounds=60")


def test_a_killed_server_and_a_killed_client_leave_the_simulated_model(turnout: Turnout, place: Path) -> None:
    address, overrides = f"127.0.0.1:{free_port()}", [word for one in CHOSEN for word in ("--set", one)]
    served = ("--address", address, "--json", "--no-plots")
    server = turnout("server", "small.toml", *overrides, *served)
    kept = ("client", "--server", address, "--clients", "0-2", "--json", "--state-dir", "kept")
    victim = turnout(*kept)
    other = turnout("client", "--server", address, "--clients", "3-5", "--json")
    server.wait_for("round 1/60")
    server.signal(signal.SIGKILL)
    server.end(-9)
    victim.signal(signal.SIGKILL)
    victim.end(-9)
    again = turnout(*kept)
    document = turnout("server", "--resume", "last", *served).end()
    assert [node.end()["reason"] for node in (again, other)] == ["the run is over"] * 2
    expected = simulated(place, *CHOSEN)
    assert document["model_sha256"] == expected.model_sha256
    assert document["metrics"] == expected.metrics


class ForgetAfter(CommitCallback):
    """Runs ``act`` at the end of round 2; keeps every round's weights and what was sent whole."""

    def __init__(self, grid: FleetGrid, act: Callable[[], None]) -> None:
        super().__init__(grid)
        self._act = act
        self.weights: list[dict[int, float]] = []
        self.whole: list[float] = []

    def on_round_end(self, report: Any) -> None:
        super().on_round_end(report)
        assert all(client.outcome == "ok" for client in report.clients)
        self.weights.append({client.client: client.weight for client in report.clients})
        self.whole.append(report.diagnostics["checkpoints-sent"])
        if report.server_round == 2:
            self._act()


def test_a_client_that_lost_its_replica_says_so_and_gets_it(
    spawn: Callable[..., Any], tmp_path: Path
) -> None:
    with FleetServer(num_clients=8, run_config={"seed": 0}, options=FleetOptions(reconnect=60)) as server:
        victim = spawn("torch_node.py", server.address, "0-2", "a", tmp_path / "a")
        spawn("torch_node.py", server.address, "3-7", "b", tmp_path / "b")
        grid = FleetGrid(server, min_clients=8, wait=60)

        def replace() -> None:
            victim.kill()
            spawn("torch_node.py", server.address, "0-2", "a", tmp_path / "empty")

        watch = ForgetAfter(grid, replace)
        model = Digits(num_clients=8, model="softmax", alpha=0.5, seed=1).initial_arrays()
        EGGROLL(num_clients=8, pairs=2).start(grid, model, num_rounds=5, timeout=60, callbacks=[watch])
    absent = [{client for client, weight in row.items() if weight == 0.0} for row in watch.weights]
    assert absent == [set(), set(), {0, 1, 2}, set(), set()]
    assert watch.whole == [0.0, 0.0, 0.0, 3.0, 0.0]
