"""Processes are killed and stopped; the model is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.server.fleet.tasks import Task
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg, Scaffold
from turnout.wire import as_array
from turnout.wire.framing import Chunk

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent
CLIENTS, SIZE = 4, 20_000


def zeros(size: int = SIZE) -> ArrayRecord:
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(size, np.float32))
    return arrays


def twin(stateful_app: Any, rounds: int, size: int = SIZE) -> str:
    strategy = Scaffold(num_clients=CLIENTS)
    strategy.start(LocalGrid(stateful_app, CLIENTS), zeros(size), num_rounds=rounds)
    return hashlib.sha256(strategy.x.tobytes()).hexdigest()


@pytest.fixture
def stateful_app() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("scaffold_node", HERE / "scaffold_node.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app(0.0)


class Hold:
    """Stops the server within a phase until the client has been killed."""

    def __init__(self) -> None:
        self.reached, self.over = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.over.wait(60)


class HoldTraining(CommitCallback):
    """From round 2 on the clients whose state is in ``state`` train until the hold is over."""

    def __init__(self, grid: FleetGrid, state: Path, hold: Hold) -> None:
        super().__init__(grid)
        self._state, self._hold = state, hold

    def on_round_end(self, report: Any) -> None:
        if report.server_round == 1:
            (self._state / "hold").touch()
            threading.Thread(target=self._watch, daemon=True).start()
        super().on_round_end(report)

    def _watch(self) -> None:
        while not (self._state / "training").exists():
            time.sleep(0.005)
        self._hold()


class HoldBeforeCommit(CommitCallback):
    """The replies of round 2 have been folded, and no client has been told."""

    def __init__(self, grid: FleetGrid, hold: Hold) -> None:
        super().__init__(grid)
        self._hold = hold

    def on_round_end(self, report: Any) -> None:
        if report.server_round == 2:
            self._hold()
        super().on_round_end(report)


def hold_an_upload(server: FleetServer, clients: range, hold: Hold) -> None:
    """Call ``hold`` when the first chunk of one of the clients' replies to a second task has come."""
    slots, receive = server.hub.slots, server.hub.slots.receive

    def watched(task: Task, chunk: Chunk) -> bool:
        complete = receive(task, chunk)
        if task.client in clients and task.exchange.server_round > 1 and not hold.reached.is_set():
            assert not complete
            hold()
        return complete

    slots.receive = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["training", "upload", "before the acknowledgement"])
def test_a_killed_client_comes_back_and_counts_once(
    when: str, spawn: Callable[..., Any], tmp_path: Path, stateful_app: Any
) -> None:
    # An upload must be larger than what the connection's buffers hold.
    size, rounds = 2_500_000 if when == "upload" else 20_000, 4
    state, hold = tmp_path / "a", Hold()
    with FleetServer(num_clients=CLIENTS, options=FleetOptions(reconnect=60)) as server:
        first = ("scaffold_node.py", server.address, "0-1", "a", state, 0.05)
        victim = spawn(*first)
        spawn("scaffold_node.py", server.address, "2-3", "b", tmp_path / "b", 0.05)
        grid = FleetGrid(server, min_clients=CLIENTS, wait=60)
        strategy = Scaffold(num_clients=CLIENTS)
        commit = CommitCallback(grid)
        if when == "training":
            commit = HoldTraining(grid, state, hold)
        elif when == "upload":
            hold_an_upload(server, range(2), hold)
        else:
            commit = HoldBeforeCommit(grid, hold)
        start = {"num_rounds": rounds, "timeout": 90, "callbacks": [commit]}
        thread = threading.Thread(target=strategy.start, args=(grid, zeros(size)), kwargs=start, daemon=True)
        thread.start()
        assert hold.reached.wait(60), "the phase was never reached"
        assert thread.is_alive()
        assert grid.server_round == 2
        victim.kill()
        (state / "hold").unlink(missing_ok=True)
        hold.over.set()
        spawn(*first)
        thread.join(90)
        assert not thread.is_alive()
    # Counted on the server's own thread, so complete once that has ended.
    assert (server.counters.lost_uploads > 0) == (when == "upload")
    assert server.counters.replies["accepted"] == rounds * CLIENTS
    assert all(report.outcome == "ok" for report in strategy.reports)
    assert hashlib.sha256(strategy.x.tobytes()).hexdigest() == twin(stateful_app, rounds, size)


def test_a_paused_client_is_missing_then_takes_part_again(
    spawn: Callable[..., Any], initial: Callable[..., Any]
) -> None:
    options = FleetOptions(deadline=2.0, reconnect=60)
    with FleetServer(options=options) as server:
        paused = spawn("numpy_app.py", server.address, "0", "--name", "paused", "--delay", "0.05")
        spawn("numpy_app.py", server.address, "1", "--name", "well", "--delay", "0.05")
        grid = FleetGrid(server, min_clients=2, wait=30)
        outcomes: list[dict[int, str]] = []
        strategy = FedAvg()

        class Watch(CommitCallback):
            def on_round_end(self, report: Any) -> None:
                super().on_round_end(report)
                outcomes.append({client.client: client.outcome for client in report.clients})
                if report.server_round == 1:
                    paused.process.send_signal(signal.SIGSTOP)
                if report.server_round == 3:
                    paused.process.send_signal(signal.SIGCONT)
                    time.sleep(1.0)

        strategy.start(grid, initial(), num_rounds=5, timeout=30, callbacks=[Watch(grid)])
    assert [row[1] for row in outcomes] == ["ok"] * 5
    assert [row[0] for row in outcomes] == ["ok", "missing", "missing", "ok", "ok"]


def test_enough_replies_close_a_round_and_cancel_the_others(
    raw_client: ModuleType, initial: Callable[..., Any]
) -> None:
    with FleetServer(options=FleetOptions(enough=2)) as server:
        clients = [raw_client.RawClient(server.address, f"c{i}", i) for i in range(3)]
        grid = FleetGrid(server, min_clients=3, wait=10)
        strategy = FedAvg()
        start = {"num_rounds": 1, "timeout": 20, "callbacks": [CommitCallback(grid)]}
        thread = threading.Thread(target=strategy.start, args=(grid, initial(400)), kwargs=start, daemon=True)
        thread.start()
        offers = [client.receive("task") for client in clients]
        clients[0].finish(offers[0])
        clients[2].finish(offers[2])
        assert clients[1].receive("cancel").task == offers[1].id
        thread.join(10)
        clients[1].finish(offers[1])
        assert clients[1].receive("ack").reason == "late"
        for client in clients:
            client.close()
    assert {report.client: report.outcome for report in strategy.reports} == {0: "ok", 1: "missing", 2: "ok"}
    assert server.counters.replies["late"] == 1


def test_sigterm_hands_back_and_max_rounds_leaves(
    spawn: Callable[..., Any], initial: Callable[..., Any]
) -> None:
    with FleetServer() as server:
        short = spawn("numpy_app.py", server.address, "0-1", "--name", "short", "--max-rounds", "2")
        long = spawn("numpy_app.py", server.address, "2", "--name", "long")
        grid = FleetGrid(server, min_clients=1, wait=30)
        while len(grid.available_ids()) < 3:
            time.sleep(0.01)
        strategy = FedAvg()
        strategy.start(grid, initial(), num_rounds=3, timeout=20, callbacks=[CommitCallback(grid)])
        assert short.result()["rounds"] == 2
        long.terminate()
        assert long.result()["reason"] == "SIGTERM"


def test_a_failing_app_is_reported_with_its_traceback(
    spawn: Callable[..., Any], initial: Callable[..., Any]
) -> None:
    with FleetServer() as server:
        spawn("numpy_app.py", server.address, "0-2", "--name", "n", "--fail", "1")
        grid = FleetGrid(server, min_clients=3, wait=30)
        strategy = FedAvg()
        strategy.start(grid, initial(), num_rounds=2, timeout=20, callbacks=[CommitCallback(grid)])
    outcomes = {report.client: report for report in strategy.reports}
    assert [outcomes[i].outcome for i in range(3)] == ["ok", "failed", "ok"]
    assert "planned failure" in outcomes[1].reason
    assert "numpy_app.py" in outcomes[1].reason
