"""The server is killed: at random moments, and before every durable step of a commit. Nothing is lost."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos_faults import kill_at_random, operations, sweep
from chaos_harness import Fault, Server, acknowledged, half_files, with_shim

from turnout.server.store import RunStore

Judge = Callable[[Server, int, str], None]
Chaos = Callable[..., Any]


def test_killed_at_random_the_run_ends_as_if_undisturbed(
    chaos: Chaos, judge: Judge, rng: random.Random, fault_log: Callable[[dict[str, Any]], None]
) -> None:
    kills = int(os.environ.get("TURNOUT_KILLS", "30"))
    rounds = 3 * kills + 20
    with chaos(rounds=rounds, forked=True) as (server, _):
        server.start()
        figures = kill_at_random(server, kills=kills, rng=rng, note=fault_log)
        model = server.finish()
        print(figures.document())
        assert (figures.kills, figures.rounds_lost) == (kills, 0)
        assert len(acknowledged(server.store.parent)) >= rounds  # The ledger is held against these.
        judge(server, rounds, model)


@pytest.mark.usefixtures("shim")
def test_killed_before_every_step_of_a_commit(chaos: Chaos, judge: Judge, tmp_path: Path) -> None:
    log, rounds = tmp_path / "steps", 60
    environment = with_shim(tmp_path / "runs", log=log)
    with chaos(rounds=rounds, forked=True, environment=environment) as (server, _):
        _one_round(server)
        log.write_text("")
        figures = sweep(server, hold_after=1)
        hit = operations(log)
        print(f"steps killed {figures.covered}/{figures.steps}: {dict(hit)}")
        assert figures.covered == figures.steps >= 30
        # Checkpoint and documents, store, and the checkpoints that are not needed any more.
        assert {"write", "fsync", "rename", "pwrite64", "fdatasync", "unlink"} <= set(hit)
        server.start()
        judge(server, rounds, server.finish())
        assert half_files(tmp_path / "runs") == []


def _one_round(server: Server) -> None:
    server.start(hold_after=1)
    server.wait_for("committed")
    server.kill()


@pytest.mark.usefixtures("shim")
def test_killed_while_the_run_is_made(tmp_path: Path) -> None:
    """Every step has a directory of its own: the next start must find a run, or make one."""
    environment = with_shim(tmp_path)
    server = Server(tmp_path, forked=True, environment=environment, rounds=1, task="create")
    try:
        for at in itertools.count(1):
            store = tmp_path / f"runs-{at}"
            server.store = store
            server.start(store=str(store), fault=Fault(at))
            if server.wait() == 0:
                break
            server.start(store=str(store))
            assert server.wait() == 0, f"step {at}: {server.life.lines}"
            assert server.rounds() == []
            assert server.status() == "running"
        print(f"steps killed {at - 1}/{server.life.lines[-1]['steps']}")
        assert at > 30
    finally:
        server.close()


@pytest.mark.usefixtures("shim")
def test_killed_while_a_client_is_enrolled(tmp_path: Path) -> None:
    """The roster is the old one or the new one; an id that was given once stays its owner's."""
    server = Server(tmp_path, forked=True, environment=with_shim(tmp_path), rounds=1, task="enrol")
    try:
        server.start(name="first")
        assert server.wait() == 0
        figures = sweep(server, done="enrolled", name="second", check=lambda _: _same_first(server))
        assert figures.covered == figures.steps > 3
        server.start(name="second")
        assert server.wait_for("enrolled")["enrolled"] == [1]
    finally:
        server.close()


def _same_first(server: Server) -> None:
    server.start(name="first")
    assert server.wait_for("enrolled")["enrolled"] == [0]
    server.wait()


@pytest.mark.alone
def test_a_second_server_is_refused_and_a_stale_lock_is_not(chaos: Chaos, judge: Judge) -> None:
    with chaos(rounds=4, forked=False) as (server, _):
        server.start(hold_after=2)
        server.wait_for("committed")
        second = Server(server.store, rounds=4)
        second.start()
        assert second.wait() == 1
        refused = second.wait_for("failed")
        assert "in use by another process" in refused["failed"]
        started = second.life.said("started")
        assert started is not None
        assert refused["at"] - started["at"] < 2
        assert server.life.code is None
        server.kill()  # Its lock file stays.
        server.start()
        judge(server, 4, server.finish())
        second.close()


def test_a_run_that_ended_stays_ended(chaos: Chaos, judge: Judge) -> None:
    with chaos(rounds=200, forked=False) as (server, _):
        server.start()
        server.wait_for("committed")
        server.signal(signal.SIGINT)
        assert server.wait() == 130
        assert server.status() == "interrupted"
        done = server.rounds()
        # A new run in the same store and on the same clients does not touch the one that was ended.
        server.start(fresh=True, rounds=3)
        model = server.finish()
        judge(server, 3, model)
        with _store(server) as store:
            _, older = store.runs()
            assert (older.status, [row.round for row in store.rounds(older.id)]) == ("interrupted", done)


def _store(server: Server) -> RunStore:
    return RunStore(server.store, create=False)


@pytest.mark.alone
def test_a_paused_server_counts_nobody_as_lost(chaos: Chaos, judge: Judge) -> None:
    """Longer than every deadline and keepalive: what came meanwhile is heard before anyone is judged."""
    options = {"deadline": 3.0, "reconnect": 3.0, "stall": 3.0, "keepalive": 1.0, "keepalive_timeout": 2.0}
    with chaos(rounds=4, pause=0.3, size=20_000, options=options, timeout=3) as (server, _):
        server.start()
        server.wait_for("offered")
        server.signal(signal.SIGSTOP)
        time.sleep(4.0)
        server.signal(signal.SIGCONT)
        model = server.finish()
        with _store(server) as store:
            outcomes = {row.outcome for row in store.client_rounds(store.runs(limit=1)[0].id)}
        assert outcomes == {"ok"}, "false losses"
        judge(server, 4, model)
