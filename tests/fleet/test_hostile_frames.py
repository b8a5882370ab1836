"""Frames that break the protocol end the stream with a reason, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import grpc
import pytest

from turnout.server.fleet import FleetOptions, FleetServer
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.framing import CHUNK_BYTES, encode_chunk
from turnout.wire.replies import EncodedReply

RoundOf = Callable[..., Any]
SMALL, LARGE = 400, 800_000


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer(options=FleetOptions(max_offences=100, reconnect=0.3)) as running:
        yield running


BROKEN: dict[str, Callable[[int, EncodedReply], list[bytes]]] = {
    "noise": lambda task, reply: [b"\xff" * 50],
    "second-hello": lambda task, reply: [pb.ClientMessage(hello=pb.Hello(name="x")).SerializeToString()],
    "chunk-for-no-task": lambda task, reply: [encode_chunk(task + 77, 0, b"abc")],
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_frames_end_the_stream_with_a_reason(
    how: str, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, LARGE)
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
def test_chunks_out_of_order_are_refused(
    chunks: Any, server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, LARGE)
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
