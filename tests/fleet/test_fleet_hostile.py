"""Clients that break the protocol or lie are answered, counted and kept out of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import ArrayRecord

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import FedAvg
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import as_array
from turnout.wire.framing import CHUNK_BYTES, encode_chunk
from turnout.wire.replies import EncodedReply

SMALL, LARGE = 400, 800_000


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


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer(options=FleetOptions(max_offences=100, stall=0.5, reconnect=3)) as running:
        yield running


def corrupt(reply: EncodedReply, **changes: Any) -> dict[str, Any]:
    head = pb.ReplyHead.FromString(reply.head)
    for record in head.records:
        if record.name == "arrays":
            for field, value in changes.items():
                if field == "layout":
                    record.arrays.ClearField("layout_digest")
                    record.arrays.layout.CopyFrom(value)
                    record.arrays.size = sum(spec.size for spec in value.arrays)
                else:
                    setattr(record.arrays, field, value)
    return {"head": head.SerializeToString()}


def layout(*specs: tuple[str, str, int]) -> pb.Layout:
    sizes = {"float32": 4, "float64": 8, "int64": 8}
    return pb.Layout(
        arrays=[
            pb.ArraySpec(
                name=name, dtype=dtype, shape=[length], stype="numpy.ndarray", size=length * sizes[dtype]
            )
            for name, dtype, length in specs
        ]
    )


LIES: dict[str, tuple[str, Callable[[EncodedReply], dict[str, Any]]]] = {
    "head-is-noise": ("wrong-layout", lambda reply: {"head": b"\xff\xfe\xfd"}),
    "other-names": (
        "wrong-layout",
        lambda r: corrupt(r, layout=layout(("w", "float32", 200), ("c", "float32", 200))),
    ),
    "other-shape": (
        "wrong-layout",
        lambda r: corrupt(r, layout=layout(("w", "float32", 100), ("b", "float32", 300))),
    ),
    "other-dtype": (
        "wrong-layout",
        lambda r: corrupt(r, layout=layout(("w", "float64", 100), ("b", "float64", 100))),
    ),
    "unknown-layout": ("wrong-layout", lambda reply: corrupt(reply, layout_digest=b"x" * 16)),
    "announces-2**63": ("wrong-layout", lambda reply: {"size": 2**63}),
    "more-bytes-than-announced": ("bad-size", lambda reply: {"data": bytes(reply.size + 4)}),
    "wrong-checksum": ("damaged", lambda reply: {"checksum": reply.checksum ^ 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_head_is_refused_and_leaves_nothing(
    lie: str, server: FleetServer, raw_client: ModuleType
) -> None:
    reason, change = LIES[lie]
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = Round(server, 2, SMALL)
        good.finish(good.receive("task"))
        offer = bad.receive("task")
        reply = bad.reply(offer)
        bad.ready(offer, reply, **change(reply))
        ack = bad.receive("ack")
        assert (ack.outcome, ack.reason) == (pb.OUTCOME_REJECTED, reason)
        outcomes = running.result()
        assert outcomes[0] == ("ok", "")
        assert outcomes[1][0] == "failed"
        assert reason in outcomes[1][1]
        assert good.receive("ack").outcome == pb.OUTCOME_ACCEPTED
    assert (running.strategy.x == 1).all()
    assert server.roster.members[1].offences == 1
    assert server.counters.reasons[reason] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_poison_is_refused_before_folding(
    value: float, size: int, server: FleetServer, raw_client: ModuleType
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = Round(server, 2, size)
        bad.finish(bad.receive("task"), value=value)
        good.finish(good.receive("task"))
        outcomes = running.result()
        expected = "too-large" if value == 1e38 else "non-finite"
        assert expected in outcomes[1][1]
        ack = bad.receive("ack")
        assert (ack.outcome, ack.reason) == (pb.OUTCOME_REJECTED, expected)
    assert (running.strategy.x == 1).all()


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"num-examples": 0}, "bad-metric"),
        ({"num-examples": -3}, "bad-metric"),
        ({"num-examples": 2**62}, "bad-metric"),
        ({"num-examples": float("nan")}, "bad-metric"),
        ({"client-id": 0}, "wrong-identity"),
        ({f"m{i}": 1.0 for i in range(300)}, "too-many-metrics"),
        ({f"m{i}": 1.0 for i in range(5000)}, "wrong-layout"),
    ],
)
def test_lying_metrics_are_refused(
    metrics: dict[str, Any], reason: str, server: FleetServer, raw_client: ModuleType
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = Round(server, 2, SMALL)
        good.finish(good.receive("task"))
        offer = bad.receive("task")
        reply = bad.reply(offer)
        head = pb.ReplyHead.FromString(reply.head)
        entries = {entry.name: entry for entry in head.records[1].metrics.entries}
        for name, value in metrics.items():
            entry = entries.get(name) or head.records[1].metrics.entries.add(name=name)
            if isinstance(value, float):
                entry.number = value
            else:
                entry.integer = value
        bad.ready(offer, reply, head=head.SerializeToString())
        ack = bad.receive("ack")
        assert (ack.outcome, ack.reason) == (pb.OUTCOME_REJECTED, reason)
        assert running.result()[0] == ("ok", "")
    assert (running.strategy.x == 1).all()


def test_replays_duplicates_and_foreign_replies_are_folded_once(
    server: FleetServer, raw_client: ModuleType
) -> None:
    with (
        raw_client.RawClient(server.address, "a", 0) as one,
        raw_client.RawClient(server.address, "b", 1) as two,
    ):
        running = Round(server, 2, SMALL, rounds=2)
        first, other = one.receive("task"), two.receive("task")
        reply = one.reply(first)
        for _ in range(3):
            one.ready(first, reply)  # The same reply three times.
        one.ready(other, one.reply(first))  # The other client's task.
        ack = one.receive("ack")
        assert (ack.task, ack.outcome, ack.reason) == (other.id, pb.OUTCOME_REJECTED, "foreign-task")
        one.ready(pb.TaskOffer(id=12345, attempt=1), reply)  # Never asked for.
        ack = one.receive("ack")
        assert (ack.task, ack.outcome, ack.reason) == (12345, pb.OUTCOME_LATE, "unknown-task")
        two.finish(other)
        ack = one.receive("ack")
        assert (ack.task, ack.outcome) == (first.id, pb.OUTCOME_ACCEPTED)
        one.ready(first, reply)  # Again, after its round.
        second, other = one.receive("task"), two.receive("task")
        one.ready(second, one.reply(second), attempt=second.attempt + 1)
        old = [one.receive("ack"), one.receive("ack")]
        assert {(ack.task, ack.outcome) for ack in old} == {
            (first.id, pb.OUTCOME_ACCEPTED), (second.id, pb.OUTCOME_LATE)}  # fmt: skip
        one.finish(second)
        two.finish(other)
        assert running.result() == {0: ("ok", ""), 1: ("ok", "")}
    assert (running.strategy.x == 2).all()
    assert server.counters.replies["accepted"] == 4
    assert server.counters.replies["duplicate"] == 3


BROKEN: dict[str, Callable[[int, EncodedReply], list[bytes]]] = {
    "noise": lambda task, reply: [b"\xff" * 50],
    "second-hello": lambda task, reply: [pb.ClientMessage(hello=pb.Hello(name="x")).SerializeToString()],
    "chunk-for-no-task": lambda task, reply: [encode_chunk(task + 77, 0, b"abc")],
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_frames_end_the_stream_with_a_reason(
    how: str, server: FleetServer, raw_client: ModuleType
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = Round(server, 2, LARGE)
        offer = bad.receive("task")
        for frame in BROKEN[how](offer.id, bad.reply(offer)):
            bad.send_bytes(frame)
        with pytest.raises(grpc.RpcError) as caught:
            bad.receive("nothing")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        good.finish(good.receive("task"))
        outcomes = running.result()
        assert outcomes[0] == ("ok", "")
        assert "lost" in outcomes[1][1]
    assert (running.strategy.x == 1).all()


@pytest.mark.parametrize(
    "chunks",
    [
        lambda task: [encode_chunk(task, CHUNK_BYTES, bytes(CHUNK_BYTES))],
        lambda task: [encode_chunk(task, 0, bytes(10))],
        lambda task: [encode_chunk(task, 0, b"")],
        lambda task: [encode_chunk(task, 0, bytes(CHUNK_BYTES))] * 2,
        lambda task: [encode_chunk(task, i * CHUNK_BYTES, bytes(CHUNK_BYTES)) for i in range(4)],
    ],
    ids=["gap", "short", "empty", "overlap", "too-long"],
)
def test_chunks_out_of_order_are_refused(chunks: Any, server: FleetServer, raw_client: ModuleType) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = Round(server, 2, LARGE)
        offer = bad.receive("task")
        bad.ready(offer, bad.reply(offer))
        for frame in chunks(bad.receive("grant").task):
            bad.send_bytes(frame)
        assert bad.receive("ack").reason == "bad-chunk"
        good.finish(good.receive("task"))
        assert running.result()[0] == ("ok", "")
    assert (running.strategy.x == 1).all()
    assert server.hub.slots.busy == 0


def test_an_oversized_message_is_refused_by_the_transport(
    server: FleetServer, raw_client: ModuleType
) -> None:
    with raw_client.RawClient(server.address, "bad", 1) as bad:
        bad.receive("welcome")
        bad.send_bytes(bytes(3 << 20))
        with pytest.raises(grpc.RpcError) as caught:
            bad.receive("nothing")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_client_that_dies_in_its_upload_leaves_nothing(
    share: float, server: FleetServer, raw_client: ModuleType
) -> None:
    size = 8 * LARGE
    with raw_client.RawClient(server.address, "good", 0) as good:
        bad = raw_client.RawClient(server.address, "bad", 1)
        running = Round(server, 2, size)
        offer = bad.receive("task")
        reply = bad.reply(offer)
        bad.ready(offer, reply)
        chunks = -(-reply.size // CHUNK_BYTES)
        bad.upload(bad.receive("grant").task, reply, upto=min(chunks - 1, max(1, round(share * chunks))))
        while server.counters.received_bytes == 0:
            threading.Event().wait(0.01)
        bad.close()
        good.finish(good.receive("task"))
        outcomes = running.result()
        assert outcomes[0] == ("ok", "")
        assert "lost" in outcomes[1][1]
    assert (running.strategy.x == 1).all()
    assert server.hub.slots.busy == 0
    assert server.counters.lost_uploads == 1


def test_a_stalled_upload_loses_its_slot_and_may_try_again(raw_client: ModuleType) -> None:
    options = FleetOptions(upload_slots=1, stall=0.4)
    with FleetServer(options=options) as server, raw_client.RawClient(server.address, "slow", 0) as slow, \
            raw_client.RawClient(server.address, "good", 1) as good:  # fmt: skip
        running = Round(server, 2, LARGE)
        offer = slow.receive("task")
        reply = slow.reply(offer)
        slow.ready(offer, reply)
        slow.receive("grant")  # And then nothing, while the only slot is taken.
        good.finish(good.receive("task"))
        ack = slow.receive("ack")
        assert (ack.outcome, ack.reason) == (pb.OUTCOME_RETRY, "stalled")
        slow.ready(offer, reply)
        slow.upload(slow.receive("grant").task, reply)
        assert running.result() == {0: ("ok", ""), 1: ("ok", "")}
    assert (running.strategy.x == 1).all()


def test_offenders_are_quarantined(raw_client: ModuleType) -> None:
    options = FleetOptions(max_offences=2)
    with FleetServer(options=options) as server, raw_client.RawClient(server.address, "bad", 1) as bad, \
            raw_client.RawClient(server.address, "good", 0) as good:  # fmt: skip
        good.receive("welcome")
        bad.receive("welcome")
        running = Round(server, 1, SMALL, rounds=3)
        for _ in range(2):
            bad.finish(bad.receive("task"), value=np.nan)
            good.finish(good.receive("task"))
        good.finish(good.receive("task"))
        assert running.result() == {0: ("ok", "")}
        assert running.grid.available_ids() == [0]
        server.roster.pardon(1)
        assert running.grid.available_ids() == [0, 1]


def test_other_versions_are_refused_naming_both(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "old", 0, protocol=99, package_version="9.9") as old:
        refusal = old.receive("refusal")
        assert refusal.reason == "wrong-version"
        for part in ("protocol 1", "protocol 99", "turnout 9.9"):
            assert part in refusal.detail


@pytest.mark.parametrize(
    ("name", "partitions", "reason"),
    [
        ("../../etc", [0], "bad-name"),
        ("a\nb", [0], "bad-name"),
        ("", [0], "bad-name"),
        ("x" * 65, [0], "bad-name"),
        ("n", [], "bad-hello"),
        ("n", [1, 1], "duplicate-client"),
        ("n", [2**63], "partition-taken"),
        ("thief", [5], "partition-taken"),
    ],
)
def test_bad_hellos_are_refused(
    name: str, partitions: list[int], reason: str, server: FleetServer, raw_client: ModuleType
) -> None:
    with raw_client.RawClient(server.address, "owner", 5) as owner:
        owner.receive("welcome")
        clients = [pb.LogicalClient(partition=partition) for partition in partitions]
        with raw_client.RawClient(server.address, name, None, clients=clients) as bad:
            assert bad.receive("refusal").reason == reason
            with pytest.raises(grpc.RpcError) as caught:
                bad.receive("nothing")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert [member.name for member in server.roster.members.values()] == ["owner"]


def test_the_same_client_twice_the_newest_wins(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "a", 0) as older:
        older.receive("welcome")
        with raw_client.RawClient(server.address, "a", 0) as newer:
            newer.receive("welcome")
            assert older.receive("refusal").reason == "replaced"
            running = Round(server, 1, SMALL)
            newer.finish(newer.receive("task"))
            assert running.result() == {0: ("ok", "")}
    assert server.counters.reasons["replaced"] == 1


def test_a_revoked_client_is_cut_off_and_its_pending_reply_refused(
    server: FleetServer, raw_client: ModuleType
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = Round(server, 2, SMALL)
        bad.receive("task")
        server.call(server.hub.revoke, "bad")
        assert bad.receive("refusal").reason == "revoked"
        good.finish(good.receive("task"))
        assert "revoked" in running.result()[1][1]
        with raw_client.RawClient(server.address, "bad", 1) as again:
            assert again.receive("refusal").reason == "revoked"
