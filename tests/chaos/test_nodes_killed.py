"""Nodes are killed: before every durable step of their journals, and within an upload."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
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
Step = tuple[str, str, int]  # Operation, kind of file, and its number among those on that file.


@pytest.mark.usefixtures("shim")
def test_a_node_killed_before_every_step_of_its_journal(chaos: Chaos, judge: Judge, tmp_path: Path) -> None:
    """State and reply are one file: a node that dies anywhere applies no round twice and loses none."""
    rounds, log = 40, tmp_path / "steps"
    environment = with_shim(tmp_path / "state-n0", log=log)
    with chaos(rounds=rounds, nodes=False, clients=2) as (server, fleet):
        fleet.start("1")
        server.start()
        node = fleet.start("0", environment={**environment, "FAULT_AT": "0"})  # Counts only.
        until(lambda: server.life.committed >= 4, what=lambda: server.life.lines[-3:])
        node.kill()
        node.wait(10)
        entry = _last_entry(log)
        assert {"write", "fsync", "rename", "unlink"} <= {operation for operation, _, _ in entry}
        log.write_text("")
        at, died = 0, set[Step]()
        # A life may first remove what the last death left, so a step of the entry comes a little later.
        while not entry <= died:
            at += 1
            assert at <= 2 * len(entry), f"never killed at {entry - died}"
            node = fleet.start("0", environment={**environment, "FAULT_AT": str(at)})
            assert node.wait(60) == -9, f"step {at}"
            died = _deaths(log)
        print(f"killed {at} times, at all {len(entry)} steps of an entry: {dict(operations(log))}")
        fleet.start("0")
        judge(server, rounds, server.finish())


def _last_entry(log: Path) -> set[Step]:
    """Return the journal's steps in the last whole round of an undisturbed life, from the shim's log."""
    lines = log.read_text().splitlines()
    told = [at for at, line in enumerate(lines) if line.endswith("/acknowledged.txt")]  # Ends a round.
    assert len(told) > 2, lines
    return set(_steps(lines[told[-2] + 1 : told[-1]]))


def _deaths(log: Path) -> set[Step]:
    """Return the steps at which the lives ended."""
    lives: list[list[str]] = []
    for line in log.read_text().splitlines():
        if line.startswith("1 "):
            lives.append([])
        lives[-1].append(line)
    return {_steps(life)[-1] for life in lives}


def _steps(lines: list[str]) -> list[Step]:
    counted, steps = Counter[tuple[str, str]](), []
    for line in lines:
        _, operation, path = line.split()
        counted[operation, path] += 1
        steps.append((operation, Path(path).suffix, counted[operation, path]))
    return steps


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
    # Counted on the server's own thread, a little later.
    until(lambda: server.counters.replies["accepted"] == rounds * 2, what=lambda: server.counters)
    expected = Scaffold(num_clients=2)
    expected.start(undisturbed(2), zeros(size), num_rounds=rounds)
    assert hashlib.sha256(strategy.x.tobytes()).digest() == hashlib.sha256(expected.x.tobytes()).digest()
