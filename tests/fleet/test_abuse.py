"""What one enrolled client can do to the others' run: nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.client.node import Node, NodeOptions
from turnout.server import RunStore
from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.strategies import FedAvg
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.event_loop import new_event_loop

pytestmark = pytest.mark.alone

PATIENCE = 20.0


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer(num_clients=2) as running:
        yield running


def test_absurd_words_about_oneself_do_not_end_a_recorded_run(
    server: FleetServer, raw_client: ModuleType, initial: Callable[..., Any], tmp_path: Path
) -> None:
    description = RunDescription(
        name="x", strategy="fedavg", task="t", seed=0, num_rounds=1, num_clients=2, config={"run": {}}
    )
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1, device="a\0\x1b[2J") as bad,
        RunStore(tmp_path) as store,
    ):
        recorder = RunRecorder.create(store, tmp_path, description)
        grid = FleetGrid(server, min_clients=2, wait=PATIENCE)
        start = {"num_rounds": 1, "timeout": PATIENCE, "callbacks": [recorder, CommitCallback(grid)]}
        run = threading.Thread(target=FedAvg().start, args=(grid, initial(100)), kwargs=start, daemon=True)
        run.start()
        offers = [client.receive("task") for client in (good, bad)]
        bad.send(progress=pb.Progress(client=1, metrics={"num-examples": 1e300, "loss\0": 1.0}))
        head = pb.ReplyHead(error="a\0b\x1b[31m\nline").SerializeToString()
        bad.send(ready=pb.Ready(task=offers[1].id, attempt=offers[1].attempt, head=head))
        good.finish(offers[0])
        run.join(PATIENCE)
        with recorder:
            pass
        rows = {row.client: row for row in store.client_rounds(recorder.run.id)}
        members = {row.client: row for row in store.clients(recorder.run.id)}
    assert (rows[0].outcome, rows[1].outcome) == ("ok", "failed")
    assert rows[1].reason is not None
    assert rows[1].reason.endswith("a\ufffdb\ufffd[31m\nline")
    assert members[1].device == "a\ufffd\ufffd[2J"
    assert members[1].examples == 1 << 40


def test_what_is_kept_of_a_client_is_bounded(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "chatty", 0) as client:
        client.receive("welcome")
        for at in range(40):
            client.send(progress=pb.Progress(client=0, metrics={f"m{at}-{i}": 1.0 for i in range(60)}))
        client.send(heartbeat=pb.Heartbeat(sequence=9))
        assert client.receive("heartbeat").sequence == 9
        assert len(server.roster.members[0].metrics) <= 64


def test_a_batch_that_never_ends_is_refused(server: FleetServer, raw_client: ModuleType) -> None:
    beat = pb.ClientMessage(heartbeat=pb.Heartbeat(sequence=1)).SerializeToString()
    with raw_client.RawClient(server.address, "flood", 0) as client:
        client.receive("welcome")
        client.send(batch=pb.Batch(messages=[beat] * 20_000))
        assert "at most" in client.receive("refusal").detail


def test_a_peer_that_reads_nothing_is_cut_off(server: FleetServer, raw_client: ModuleType) -> None:
    beat = pb.ClientMessage(heartbeat=pb.Heartbeat(sequence=1)).SerializeToString()
    with raw_client.RawClient(server.address, "deaf", 0) as client:
        client.receive("welcome")
        connection = server.hub.connections[0]
        until(lambda: connection.outbox._waiter is not None)
        connection.outbox._short.extend([b""] * 10_001)  # As if it had not read for long.
        client.send_bytes(beat)
        until(lambda: 0 not in server.hub.connections)


def test_clients_beyond_the_experiment_are_refused(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "third", 2) as client:
        refusal = client.receive("refusal")
    assert (refusal.reason, len(server.roster)) == ("unknown-partition", 0)


def test_a_stalled_upload_starts_again_without_its_own_leftovers(spawn: Any, initial: Any) -> None:
    """A slow node is not taken for a broken one: no frame of its first upload follows its second offer."""
    options = FleetOptions(stall=0.5, min_rate=1e12, reconnect=60)
    with FleetServer(num_clients=1, options=options) as server:
        grid = FleetGrid(server, min_clients=1, wait=PATIENCE)
        node = spawn("numpy_app.py", server.address, "0", "--name", "slow")
        strategy = FedAvg()
        start = {"num_rounds": 1, "timeout": 60, "callbacks": [CommitCallback(grid)]}
        run = threading.Thread(
            target=strategy.start, args=(grid, initial(25_000_000)), kwargs=start, daemon=True
        )
        run.start()
        # Stop the node in the middle of its upload, for longer than the grace.
        until(lambda: any(t.receipt and t.receipt.received for t in list(server.hub.slots._active)), 60)
        node.process.send_signal(signal.SIGSTOP)
        until(lambda: server.counters.replies["retry"] >= 1)
        object.__setattr__(server.options, "min_rate", 1.0)
        node.process.send_signal(signal.SIGCONT)
        run.join(60)
        assert not run.is_alive()
    assert [(r.outcome, r.reason) for r in strategy.reports] == [("ok", "")]
    assert server.roster.members[0].offences == 0


def test_rules_about_clients_are_applied_once_they_have_said_what_they_are(raw_client: ModuleType) -> None:
    """A client that has just come is waited for, until it has told how many examples it has."""

    class Everyone:
        def mask(self, server_round: int) -> Any:
            return np.array([True, True])

    with FleetServer(num_clients=2) as server:
        grid = FleetGrid(
            server, wait=PATIENCE, participation=Everyone(), eligible=lambda said: said["examples"] > 9
        )
        found: list[list[int]] = []
        waiting = threading.Thread(target=lambda: found.append(grid.get_node_ids()), daemon=True)
        waiting.start()
        with (
            raw_client.RawClient(server.address, "small", 0) as small,
            raw_client.RawClient(server.address, "large", 1) as large,
        ):
            for client in (small, large):
                client.receive("welcome")
            time.sleep(0.3)
            assert not found
            small.send(progress=pb.Progress(client=0, metrics={"num-examples": 3}))
            large.send(progress=pb.Progress(client=1, metrics={"num-examples": 30}))
            waiting.join(PATIENCE)
    assert found == [[1]]


def test_a_round_is_waited_for_once(raw_client: ModuleType) -> None:
    class Everyone:
        def mask(self, server_round: int) -> Any:
            return np.array([True, True])

    with FleetServer(num_clients=2) as server, raw_client.RawClient(server.address, "one", 0) as client:
        client.receive("welcome")
        grid = FleetGrid(server, wait=0.6, participation=Everyone())
        began = time.monotonic()
        grid.start_round(1)
        assert grid.get_node_ids() == grid.get_node_ids() == [0]
        assert 0.5 < time.monotonic() - began < 1.5


def test_an_app_that_needs_a_thread_gets_one() -> None:
    """Quick tasks run on the node's event loop; an app that cannot is run on a thread, and stays there."""
    import asyncio

    where: list[str] = []
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        where.append(threading.current_thread().name)
        asyncio.run(asyncio.sleep(0))
        return Message(RecordDict({"metrics": MetricRecord({"a": 1})}), reply_to=message)

    async def serve(address: str) -> None:
        await Node(address, app, NodeOptions(name="n", clients=[0])).run()

    with FleetServer(num_clients=1) as server:

        def work() -> None:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(serve(server.address))

        node = threading.Thread(target=work, name="node", daemon=True)
        node.start()
        grid = FleetGrid(server, wait=PATIENCE)
        for _ in range(6):
            [client] = grid.get_node_ids()
            content = RecordDict({"config": ConfigRecord({"a": 1})})
            [answer] = grid.send_and_receive([grid.create_message(content, "query", client, "g")])
            assert not answer.has_error(), answer.error.reason
    node.join(PATIENCE)
    assert "node" in where  # It was tried there, once.
    assert where.count("node") == 1
