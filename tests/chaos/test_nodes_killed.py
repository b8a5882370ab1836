"""Nodes are killed: before every durable step of their journals, and within an upload."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_faults import operations
from chaos_harness import Fleet, Server, build_shim, undisturbed, until, with_shim, zeros

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import Scaffold

Judge = Callable[[Server, int, str], None]
Chaos = Callable[..., Any]


@pytest.mark.usefixtures("shim")
def test_a_node_killed_before_every_step_of_its_journal(chaos: Chaos, judge: Judge, tmp_path: Path) -> None:
    """State and reply are one file: a node that dies anywhere applies no round twice and loses none."""
    rounds, steps = 24, 10  # A round's entry takes 7 to 9: writes, syncs, renaming, forgetting the oldest.
    log = tmp_path / "steps"
    environment = with_shim(tmp_path / "state-n0", log=log)
    with chaos(rounds=rounds, nodes=False, clients=2) as (server, fleet):
        fleet.start("1")
        server.start()
        for step in range(1, steps + 1):
            node = fleet.start("0", environment={**environment, "FAULT_AT": str(step)})
            assert node.wait(60) == -9, f"step {step}"
        hit = operations(log)
        print(f"steps of the journal killed {steps}/{steps}: {dict(hit)}")
        assert {"write", "fsync", "rename"} <= set(hit)
        fleet.start("0")
        judge(server, rounds, server.finish())


@pytest.fixture
def small_fleet(tmp_path: Path) -> Iterator[tuple[FleetServer, Fleet]]:
    with FleetServer(num_clients=2, options=FleetOptions(reconnect=60)) as server:
        fleet = Fleet(tmp_path, server.address, pause=0.0)
        yield server, fleet
        fleet.close()


@pytest.mark.skipif(build_shim() is None, reason="the fault shim needs gcc (or cc) on Linux")
@pytest.mark.parametrize("percent", [1, 50, 99])
def test_a_node_killed_within_an_upload_leaves_nothing(
    percent: int, small_fleet: tuple[FleetServer, Fleet], tmp_path: Path
) -> None:
    """It dies when so many percent of its reply's bytes are sent; what had come leaves the sum as it was."""
    server, fleet = small_fleet
    size, rounds = 2_500_000, 2  # A reply is model and control variate: 20 MB.
    sent = 2 * 4 * size * percent // 100
    environment = {**with_shim(tmp_path), "FAULT_SEND": str(sent)}
    victim = fleet.start("0", environment=environment)
    fleet.start("1")
    grid = FleetGrid(server, min_clients=2, wait=60)
    strategy = Scaffold(num_clients=2)
    start = {"num_rounds": rounds, "timeout": 60, "callbacks": [CommitCallback(grid)]}
    thread = threading.Thread(target=strategy.start, args=(grid, zeros(size)), kwargs=start, daemon=True)
    thread.start()
    assert victim.wait(60) == -9
    until(lambda: server.counters.lost_uploads == 1, what=lambda: server.counters)
    fleet.start("0")
    thread.join(60)
    assert not thread.is_alive()
    assert [report.outcome for report in strategy.reports] == ["ok", "ok"]
    assert server.counters.replies["accepted"] == rounds * 2
    expected = Scaffold(num_clients=2)
    expected.start(undisturbed(2), zeros(size), num_rounds=rounds)
    assert hashlib.sha256(strategy.x.tobytes()).digest() == hashlib.sha256(expected.x.tobytes()).digest()
