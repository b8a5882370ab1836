"""What must have happened before what: checkpoint, store, acknowledgement; a client's state and its reply."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from chaos_harness import NAME, SYNC, WRITE, Fault, Server, undisturbed, with_shim, zeros
from flwr.app import MetricRecord, RecordDict
from raw_client import RawClient

from turnout.client.node.journal import ClientJournal, Entry
from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.store import RunStore
from turnout.strategies import Callback, FedAvg, RoundReport, Scaffold
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import load_checkpoint, save_checkpoint


@pytest.mark.usefixtures("shim")
def test_a_round_is_committed_after_its_checkpoint_is_synced(tmp_path: Path) -> None:
    log = tmp_path / "steps"
    store = tmp_path / "runs"
    store.mkdir()
    server = Server(store, environment=with_shim(store, log=log), rounds=2, task="local", clients=2, size=100)
    server.start()
    assert server.wait() == 0
    server.start(rounds=3, fault=Fault(1 << 40, kinds=WRITE | SYNC | NAME))
    assert server.wait() == 0
    server.close()
    steps = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    written = _first(steps, "write", "round-000003")
    synced = _first(steps, "fsync", ".round-000003", after=written)
    renamed = _first(steps, "rename", "round-000003.safetensors", after=synced)
    kept = _first(steps, "fsync", "checkpoints", after=renamed)
    row = _first(steps, "pwrite64", "turnout.sqlite-wal", after=written)
    assert kept < row, "the store is written before the checkpoint is durable"
    committed = _first(steps, "fdatasync", "turnout.sqlite-wal", after=row)
    assert committed < _first(steps, "write", "metrics.jsonl", after=row), "the commit is not synced"


def _first(steps: list[str], operation: str, path: str, *, after: int = -1) -> int:
    found = (at for at, step in enumerate(steps) if step.startswith(operation) and path in step)
    return next((at for at in found if at > after), len(steps))


class Slow(Callback):
    """A recorder that takes its time."""

    durable = float("inf")

    def on_round_end(self, report: RoundReport) -> None:
        time.sleep(0.3)
        self.durable = time.monotonic()


def test_no_client_is_told_before_the_round_is_durable() -> None:
    with FleetServer() as server, RawClient(server.address, "raw") as client:
        grid, slow = FleetGrid(server, min_clients=1, wait=20), Slow()
        thread = _start(grid, 1, [slow, CommitCallback(grid)])
        client.finish(client.receive("task"))
        ack = client.receive("ack")
        told = time.monotonic()
        thread.join(20)
    assert ack.outcome == pb.OUTCOME_ACCEPTED
    assert told >= slow.durable


def test_a_reply_of_an_old_attempt_is_late() -> None:
    """The work was offered again after the stream was lost: only the newest offer is answered."""
    with FleetServer(options=FleetOptions(reconnect=20)) as server:
        grid = FleetGrid(server, min_clients=1, wait=20)
        with RawClient(server.address, "raw") as client:
            thread = _start(grid, 1, [CommitCallback(grid)])
            first = client.receive("task")
        with RawClient(server.address, "raw") as client:
            second = client.receive("task")
            assert (second.id, second.attempt) == (first.id, first.attempt + 1)
            client.work(second)
            client.finish(first)
            ack = client.receive("ack")
            assert (ack.outcome, ack.reason) == (pb.OUTCOME_LATE, "old-attempt")
            client.finish(second)
            assert client.receive("ack").outcome == pb.OUTCOME_ACCEPTED
            thread.join(20)


def _start(grid: FleetGrid, rounds: int, callbacks: list[Callback]) -> threading.Thread:
    settings = {"num_rounds": rounds, "timeout": 20, "callbacks": callbacks}
    thread = threading.Thread(target=FedAvg().start, args=(grid, zeros(400)), kwargs=settings, daemon=True)
    thread.start()
    return thread


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        description = RunDescription(
            name="a", strategy="scaffold", task="noise", seed=0, num_rounds=3, num_clients=2, config={}
        )
        with RunRecorder.create(store, tmp_path, description) as recorder:
            Scaffold(num_clients=2).start(undisturbed(2), zeros(50), num_rounds=3, callbacks=[recorder])
        newest = recorder.directory.checkpoint(3)
        save_checkpoint(newest, {**load_checkpoint(newest), "run": "00000000"})
        run = store.run(recorder.run.id)
        again, tree = RunRecorder.resume(store, run, num_rounds=3, config={})
        again.directory.release()
    assert tree is not None
    assert (again.last_round, tree["round"]) == (2, 2)


def test_a_round_done_twice_changes_the_state_once(tmp_path: Path) -> None:
    """A server that went back asks again: from the state before, and the kept reply is the same."""
    reply = RecordDict({"metrics": MetricRecord({"loss": 0.5})})
    journal = ClientJournal(tmp_path)
    journal.commit(1, Entry("digest", 0, _state(1), reply), keep_round=0)
    journal.commit(2, Entry("digest-2", 1, _state(2), reply), keep_round=0)
    reopened = ClientJournal(tmp_path)  # As after SIGKILL.
    assert _count(reopened.state(1)) == 1
    assert _count(reopened.state(2)) == 2
    kept = reopened.reply(2, "digest-2", 1)
    assert kept is not None
    assert dict(kept["metrics"]) == {"loss": 0.5}
    assert reopened.reply(2, "digest-2", 0) is None
    assert reopened.reply(2, "another", 1) is None


def _state(count: int) -> RecordDict:
    return RecordDict({"count": MetricRecord({"n": count})})


def _count(state: RecordDict) -> int:
    return int(state["count"]["n"])
