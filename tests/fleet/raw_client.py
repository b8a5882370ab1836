"""A client that speaks the protocol by hand, for sending what no node would send."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from turnout.v1 import fleet_pb2 as pb
from turnout.wire import as_array, view
from turnout.wire.framing import PROTOCOL_VERSION, Chunk, chunk_frames, decode_server, split_frames
from turnout.wire.replies import INLINE_BYTES, EncodedReply, encode_reply
from turnout.wire.work import DecodedWork, decode_work, payload_ids


class RawClient:
    """One stream. ``receive`` returns the next message of a kind and keeps the chunks that pass by."""

    def __init__(
        self, address: str, name: str = "raw", partition: int | None = 0, *, channel: Any = None, **hello: Any
    ) -> None:
        self.channel = channel or grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stub = self.channel.stream_stream(
            "/turnout.v1.Fleet/Connect", request_serializer=None, response_deserializer=None
        )
        self.call = stub(iter(self._out.get, None), timeout=60)
        self._waiting: deque[pb.ServerMessage] = deque()
        self.payloads: dict[int, bytearray] = {}
        self.layouts: dict[bytes, Any] = {}
        if partition is not None:
            hello.setdefault("clients", [pb.LogicalClient(partition=partition)])
        hello.setdefault("protocol", PROTOCOL_VERSION)
        self.send(hello=pb.Hello(name=name, **hello))

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.call.cancel()
        self._out.put(None)
        self.channel.close()

    def send(self, **body: Any) -> None:
        self._out.put(pb.ClientMessage(**body).SerializeToString())

    def send_bytes(self, raw: bytes) -> None:
        self._out.put(raw)

    def messages(self) -> Iterator[pb.ServerMessage]:
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            self._read()

    def _read(self) -> None:
        message = decode_server(next(self.call))
        if isinstance(message, Chunk):
            self.payloads.setdefault(message.id, bytearray()).extend(message.data)
        elif message.WhichOneof("body") == "batch":
            self._waiting.extend(split_frames(message.batch, pb.ServerMessage))
        else:
            self._waiting.append(message)

    def receive(self, kind: str) -> Any:
        for message in self.messages():
            if message.WhichOneof("body") == kind:
                return getattr(message, kind)
        raise EOFError(kind)

    def work(self, offer: pb.TaskOffer) -> DecodedWork:
        work = pb.Work.FromString(offer.work)
        sizes = {r.arrays.payload: r.arrays.size for r in work.records if r.arrays.payload}
        while any(len(self.payloads.get(i, b"")) < size for i, size in sizes.items()):
            self._read()
        blocks = {i: np.frombuffer(self.payloads[i], np.uint8) for i in payload_ids(work)}
        decoded = decode_work(work, blocks.__getitem__)
        self.layouts = decoded.layouts
        return decoded

    def reply(self, offer: pb.TaskOffer, *, value: float | None = None, **metrics: Any) -> EncodedReply:
        """Return a correct reply, with ``value`` at the arrays' last place and other metrics if given."""
        arrays = ArrayRecord()
        received = self.work(offer).content["arrays"]
        for name, array in received.items():
            block = view(array) + np.float32(1)
            if value is not None:
                block.reshape(-1)[-1] = value
            arrays[name] = as_array(block)
        said = {"num-examples": 1, "client-id": offer.client, **metrics}
        return encode_reply(RecordDict({"arrays": arrays, "metrics": MetricRecord(said)}), self.layouts)

    def ready(self, offer: pb.TaskOffer, reply: EncodedReply, **changes: Any) -> None:
        body = b"".join(reply.pieces) if reply.size <= INLINE_BYTES else b""
        fields = {"task": offer.id, "attempt": offer.attempt, "head": reply.head, "size": reply.size,
                  "checksum": reply.checksum, "data": body}  # fmt: skip
        self.send(ready=pb.Ready(**{**fields, **changes}))

    def upload(self, task: int, reply: EncodedReply, *, upto: int | None = None) -> None:
        for frame in list(chunk_frames(task, reply.pieces))[:upto]:
            self.send_bytes(frame)

    def finish(self, offer: pb.TaskOffer, **changes: Any) -> None:
        """Answer an offer as a good client does."""
        reply = self.reply(offer, **changes)
        self.ready(offer, reply)
        if reply.size > INLINE_BYTES:
            self.upload(self.receive("grant").task, reply)
