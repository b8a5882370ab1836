"""Replies that lie are answered, counted and kept out of the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from turnout.server.fleet import FleetOptions, FleetServer
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import as_array, view
from turnout.wire.framing import CHUNK_BYTES
from turnout.wire.replies import EncodedReply, encode_reply
from turnout.wire.scalars import encode_scalars

RoundOf = Callable[..., Any]
SMALL, LARGE = 400, 800_000


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer(options=FleetOptions(max_offences=100, reconnect=0.3)) as running:
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
    lie: str, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    reason, change = LIES[lie]
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, SMALL)
        good.finish(good.receive("task"))
        offer = bad.receive("task")
        reply = bad.reply(offer)
        bad.ready(offer, reply, **change(reply))
        ack = bad.receive("ack")
        assert (ack.outcome, ack.reason) == (pb.OUTCOME_REJECTED, reason)
        outcomes = running.result()
        assert outcomes[0] == ("ok", "")
        assert outcomes[1][0] == "rejected"
        assert reason in outcomes[1][1]
        assert good.receive("ack").outcome == pb.OUTCOME_ACCEPTED
    assert (running.strategy.x == 1).all()
    assert server.roster.members[1].offences == 1
    assert server.counters.reasons[reason] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_poison_is_refused_before_folding(
    value: float, size: int, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, size)
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
    metrics: dict[str, Any], reason: str, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, SMALL)
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
    server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "a", 0) as one,
        raw_client.RawClient(server.address, "b", 1) as two,
    ):
        running = round_of(server, 2, SMALL, rounds=2)
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
    server.wait_for(asyncio.sleep(0.05), 5)  # The event loop hears of verdicts a little later.
    assert server.counters.replies["accepted"] == 4
    assert server.counters.replies["duplicate"] == 3


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_client_that_dies_in_its_upload_leaves_nothing(
    share: float, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    size = 8 * LARGE
    with raw_client.RawClient(server.address, "good", 0) as good:
        bad = raw_client.RawClient(server.address, "bad", 1)
        running = round_of(server, 2, size)
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


def test_a_stalled_upload_loses_its_slot_and_may_try_again(raw_client: ModuleType, round_of: RoundOf) -> None:
    options = FleetOptions(upload_slots=1, stall=0.4)
    with FleetServer(options=options) as server, raw_client.RawClient(server.address, "slow", 0) as slow, \
            raw_client.RawClient(server.address, "good", 1) as good:  # fmt: skip
        running = round_of(server, 2, LARGE)
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


def test_offenders_are_quarantined(raw_client: ModuleType, round_of: RoundOf) -> None:
    options = FleetOptions(max_offences=2)
    with FleetServer(options=options) as server, raw_client.RawClient(server.address, "bad", 1) as bad, \
            raw_client.RawClient(server.address, "good", 0) as good:  # fmt: skip
        good.receive("welcome")
        bad.receive("welcome")
        running = round_of(server, 1, SMALL, rounds=3)
        for _ in range(2):
            bad.finish(bad.receive("task"), value=np.nan)
            good.finish(good.receive("task"))
        good.finish(good.receive("task"))
        assert running.result() == {0: ("ok", "")}
        assert running.grid.available_ids() == [0]
        server.roster.pardon(1)
        assert running.grid.available_ids() == [0, 1]


@pytest.mark.parametrize("shape", [[2**62 - 1, 0], [2**61, 2**61, 0]])
def test_an_extra_record_of_an_impossible_shape_does_not_end_the_run(
    shape: list[int], server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, SMALL)
        good.finish(good.receive("task"))
        offer = bad.receive("task")
        reply = bad.reply(offer)
        head = pb.ReplyHead.FromString(reply.head)
        spec = pb.ArraySpec(name="x", dtype="float32", shape=shape, stype="numpy.ndarray")
        head.records.add(name="extra", arrays=pb.ArrayBlock(layout=pb.Layout(arrays=[spec])))
        bad.ready(offer, reply, head=head.SerializeToString())
        outcomes = running.result()
        assert outcomes[0] == ("ok", "")
        assert outcomes[1][0] == "rejected"


def test_floods_of_subnormal_and_huge_values_leave_the_model_finite(
    server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    """Each within the limits; two clients that push in the same direction cannot overflow the sum."""
    with (
        raw_client.RawClient(server.address, "tiny", 0) as tiny,
        raw_client.RawClient(server.address, "huge", 1) as huge,
    ):
        running = round_of(server, 2, LARGE, rounds=3)
        for _ in range(3):
            offers = [client.receive("task") for client in (tiny, huge)]
            for client, offer, value in zip((tiny, huge), offers, (1e-42, 9e15), strict=True):
                arrays = client.work(offer).content["arrays"]
                filled = {name: as_array(np.full_like(view(a), value)) for name, a in arrays.items()}
                metrics = MetricRecord({"num-examples": 1, "client-id": offer.client})
                content = RecordDict({"arrays": ArrayRecord(filled), "metrics": metrics})
                reply = encode_reply(content, client.layouts)
                client.ready(offer, reply)
                client.upload(client.receive("grant").task, reply)
        running.result()
    assert np.isfinite(running.strategy.x).all()


def test_a_reply_of_another_run_is_not_taken(raw_client: ModuleType, round_of: RoundOf) -> None:
    """Recorded in one run and sent in the next, under the number that a task of the next really has."""
    recorded = []
    for _ in range(2):
        with FleetServer(options=FleetOptions(max_offences=100)) as server, \
                raw_client.RawClient(server.address, "a", 0) as client:  # fmt: skip
            running = round_of(server, 1, SMALL)
            offer = client.receive("task")
            for old, reply in recorded:
                assert old.id != offer.id  # Numbers are not used again by a server that is started anew.
                client.ready(old, reply)
                ack = client.receive("ack")
                assert (ack.outcome, ack.reason) == (pb.OUTCOME_LATE, "unknown-task")
            recorded.append((offer, client.reply(offer)))
            client.finish(offer)
            assert running.result() == {0: ("ok", "")}
            assert (running.strategy.x == 1).all()


def test_metrics_are_cut_to_a_bounded_size(
    server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    """Neither many names nor long ones are kept, and what a client says of itself names no file."""
    with raw_client.RawClient(server.address, "a", 0) as client:
        client.receive("welcome")
        flood = {f"{'n' * 200}{i}": float(i) for i in range(5000)} | {"../../x": 1.0, "a\nb\0": float("nan")}
        client.send(progress=pb.Progress(client=0, metrics=flood))
        running = round_of(server, 1, SMALL)
        client.finish(client.receive("task"))
        assert running.result() == {0: ("ok", "")}
        kept = server.roster.members[0].metrics
    assert len(kept) <= 64
    assert all(len(name) <= 64 and np.isfinite(value) for name, value in kept.items())


@pytest.mark.parametrize("value", ["5", b"5", [5], True])
def test_examples_that_are_no_number_are_refused(
    value: Any, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with raw_client.RawClient(server.address, "bad", 0) as bad:
        running = round_of(server, 1, SMALL)
        offer = bad.receive("task")
        reply = bad.reply(offer)
        head = pb.ReplyHead.FromString(reply.head)
        entries = {"num-examples": value, "client-id": 0}
        head.records[1].metrics.CopyFrom(encode_scalars(entries))
        bad.ready(offer, reply, head=head.SerializeToString())
        assert bad.receive("ack").outcome == pb.OUTCOME_REJECTED
        assert running.result()[0][0] == "rejected"
