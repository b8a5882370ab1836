"""Wall clocks that jump, and a link that goes away without a word."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_harness import HOSTS, Fleet, Server, set_clock, until, with_shim, zeros

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.server.store import RunStore
from turnout.strategies import Scaffold

pytestmark = pytest.mark.alone

Judge = Callable[[Server, int, str], None]
Chaos = Callable[..., Any]
DAY = 86_400


@pytest.mark.usefixtures("shim")
def test_clocks_that_jump_change_nothing(chaos: Chaos, judge: Judge, tmp_path: Path) -> None:
    """The server's clock goes a day forth and back, the nodes' clocks are a day off either way."""
    rounds, clocks = 30, {}
    for at, name in enumerate(("server", *HOSTS)):
        clocks[name] = tmp_path / f"clock-{at}"
        set_clock(clocks[name], (0, DAY, -DAY, 0)[at])
    options = {"deadline": 20.0, "keepalive": 1.0, "keepalive_timeout": 2.0, "reconnect": 20.0}
    environment = with_shim(tmp_path, clock=clocks["server"])
    with chaos(
        rounds=rounds, nodes=False, pause=0.1, forked=False, environment=environment, options=options
    ) as (server, fleet):
        for host in HOSTS:
            fleet.start(host, environment=with_shim(tmp_path, clock=clocks[host]))
        server.start()
        server.wait_for("committed")
        for shift in (DAY, -DAY, 0, DAY, -DAY):
            set_clock(clocks["server"], shift)
            set_clock(clocks[HOSTS[2]], -shift)
            time.sleep(0.3)
        judge(server, rounds, server.finish())
        with RunStore(server.store, create=False) as store:
            run = store.runs(limit=1)[0]
            assert {row.outcome for row in store.client_rounds(run.id)} == {"ok"}
            seconds = [row.train_seconds for row in store.rounds(run.id)]
            times = [row.committed_at for row in store.rounds(run.id)]
        assert 0 <= min(seconds) <= max(seconds) < 60, "a duration follows the wall clock"
        assert times != sorted(times), "the clock did not jump: the test proves nothing"
        assert run.seconds < 300


@pytest.fixture
def link() -> Iterator[tuple[str, list[str], Callable[[str], None]]]:
    """A network namespace beside ours: our address in it, the prefix to run there, and its switch."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a link that can be cut needs root and the ip command")
    name = f"turnout{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    net = 200 + os.getpid() % 50
    host, inside = f"10.{net}.7.1", f"10.{net}.7.2"
    outer, inner = f"tn{os.getpid()}a", f"tn{os.getpid()}b"
    try:
        ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", name)
        ip("addr", "add", f"{host}/24", "dev", outer)
        ip("link", "set", outer, "up")
        ip("-n", name, "addr", "add", f"{inside}/24", "dev", inner)
        ip("-n", name, "link", "set", inner, "up")
        yield host, ["ip", "netns", "exec", name], lambda state: ip("-n", name, "link", "set", inner, state)
    finally:
        subprocess.run(["ip", "link", "del", outer], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_client_that_vanishes_without_a_word_is_noticed(
    link: tuple[str, list[str], Callable[[str], None]], tmp_path: Path
) -> None:
    """Its link goes down in a round: no FIN, no RST. Keepalive finds out, the round closes without it."""
    host, prefix, switch = link
    options = FleetOptions(keepalive=1.0, keepalive_timeout=1.0, reconnect=0.5)
    with FleetServer(f"{host}:0", insecure=True, options=options) as server:
        near, far = Fleet(tmp_path, server.address, pause=0.1), Fleet(tmp_path, server.address, pause=60)
        near.start("0")
        far.start("1", prefix=prefix)
        try:
            grid, strategy = FleetGrid(server, min_clients=2, wait=60), Scaffold(num_clients=2)
            start = {"num_rounds": 1, "timeout": 60, "callbacks": [CommitCallback(grid)]}
            thread = threading.Thread(target=strategy.start, args=(grid, zeros(100)), kwargs=start)
            thread.start()
            until(lambda: server.counters.offers == 2, what=lambda: server.counters)
            switch("down")
            cut = time.monotonic()
            until(lambda: server.counters.disconnects == 1, 20, what=lambda: server.counters)
            noticed = time.monotonic() - cut
            thread.join(20)
            closed = time.monotonic() - cut
        finally:
            near.close()
            far.close()
    print(f"noticed after {noticed:.2f} s, round closed after {closed:.2f} s")
    # Keepalive and its timeout, and what a busy machine adds.
    assert noticed < 2 * (options.keepalive + options.keepalive_timeout) + 2
    assert closed < noticed + options.reconnect + 2
    assert {report.client: report.outcome for report in strategy.reports} == {0: "ok", 1: "failed"}
