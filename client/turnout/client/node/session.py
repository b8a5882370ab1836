"""One stream to the server, from hello to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc

from turnout.client.node import telemetry
from turnout.client.node.board import NodeTask, TaskBoard
from turnout.client.node.options import NodeOptions
from turnout.client.node.runner import Federation
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import keys
from turnout.wire.errors import TurnoutError
from turnout.wire.framing import (
    PROTOCOL_VERSION,
    Chunk,
    FrameError,
    chunk_frames,
    decode_server,
    split_frames,
)
from turnout.wire.outbox import Outbox
from turnout.wire.replies import INLINE_BYTES
from turnout.wire.scalars import decode_scalars
from turnout.wire.version import package_version

log = logging.getLogger("turnout.client.node")

_METHOD: Final = "/turnout.v1.Fleet/Connect"
_RETRY_SECONDS: Final = 0.5


class NodeRefused(TurnoutError):  # noqa: N818 - the server's answer
    """The server does not want this node; coming back would not help. ``reason`` is a kebab-case word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"the server refused this node ({reason}): {detail}")
        self.reason = reason


class Session:
    """One stream; ``settled`` is called after each acknowledgement.

    ``welcomed`` tells whether the server took the node, ``over`` whether the run ended. While ``draining``
    no new task is taken.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        board: TaskBoard,
        options: NodeOptions,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self._board = board
        self._settled = settled
        self._options = options
        self._outbox = Outbox()
        self._call: grpc.aio.StreamStreamCall[Any, Any] = channel.stream_stream(
            _METHOD, request_serializer=None, response_deserializer=self._read
        )()
        self.welcomed = False
        self.over = False
        self.draining = False

    async def run(self, ids: list[int]) -> None:
        """Serve the stream until it ends; ``ids`` are the clients' ids as far as they are known.

        Raises `NodeRefused`, `FrameError` and gRPC's errors.
        """
        self._board.begin()
        self._send(hello=self._hello(ids))
        writer = asyncio.create_task(self._outbox.run(self._write))
        try:
            while True:
                message: Any = await self._call.read()
                if message is grpc.aio.EOF:
                    break
                if isinstance(message, FrameError):
                    raise message
                self._receive(message, ids)
            code = await self._call.code()
            if code is not grpc.StatusCode.OK:
                log.info("the stream ended: %s %s", code, await self._call.details())
        finally:
            self._outbox.close()
            writer.cancel()
            self._call.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await writer

    async def leave(self, reason: str) -> None:
        """Say goodbye and end the stream."""
        self._send(goodbye=pb.Goodbye(reason=reason))
        self._outbox.close()
        await asyncio.sleep(0.05)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    def offer_reply(self, task: NodeTask) -> None:
        """Tell the server that a reply is ready; a small one goes with it."""
        reply = task.reply
        if reply is None or not self.welcomed:
            return
        data = b"".join(reply.pieces) if reply.size <= INLINE_BYTES else b""
        self._send(
            ready=pb.Ready(
                task=task.offer.id,
                attempt=task.offer.attempt,
                head=reply.head,
                size=reply.size,
                checksum=reply.checksum,
                data=data,
                metrics=telemetry.of_task(task.seconds, reply.size, task.request_bytes, reply.num_examples)
                | telemetry.of_node(),
            )
        )

    def heartbeat(self, sequence: int) -> None:
        """Show that the node's own loop is alive, and how long its tasks have taken so far."""
        if not self.welcomed:
            return
        self._send(heartbeat=pb.Heartbeat(sequence=sequence))
        for task, seconds in self._board.running():
            metrics = {"running-seconds": seconds} | telemetry.of_node()
            self._send(progress=pb.Progress(client=task.offer.client, task=task.offer.id, metrics=metrics))

    async def _write(self, frame: bytes) -> None:
        self._options.watch.traffic(sent=len(frame))
        await self._call.write(frame)

    def _read(self, raw: bytes) -> Chunk | pb.ServerMessage | FrameError:
        self._options.watch.traffic(received=len(raw))
        try:
            return decode_server(raw)
        except FrameError as error:
            return error

    def _send(self, **body: Any) -> None:
        self._outbox.send(pb.ClientMessage(**body).SerializeToString())

    def _hello(self, ids: list[int]) -> pb.Hello:
        options = self._options
        hello = pb.Hello(
            protocol=PROTOCOL_VERSION,
            package_version=package_version(),
            name=options.name,
            capabilities=("crc32", "inline", "shared-payloads"),
            device=options.device,
        )
        for at, partition in enumerate(options.clients or [None]):
            client = hello.clients.add(tags=dict(options.tags))
            if partition is not None:
                client.partition = partition
            known = ids[at] if ids else partition
            if known is not None:
                client.holding.extend(self._board.holding(known))
        return hello

    def _receive(self, message: Chunk | pb.ServerMessage, ids: list[int]) -> None:
        if isinstance(message, Chunk):
            self._board.chunk(message)
            return
        kind = message.WhichOneof("body")
        if kind == "task":
            if not self.draining:  # Else the goodbye hands it back.
                self._board.offer(message.task)
        elif kind == "batch":
            for part in split_frames(message.batch, pb.ServerMessage):
                self._receive(part, ids)
        elif kind == "grant":
            self._upload(message.grant.task)
        elif kind == "ack":
            self._acknowledged(message.ack)
        elif kind == "cancel":
            self._board.cancel(message.cancel.task)
        elif kind == "release":
            self._board.release(list(message.release.payloads))
        elif kind == "welcome":
            self._welcome(message.welcome, ids)
        elif kind == "refusal":
            refusal = message.refusal
            if not refusal.retry:
                raise NodeRefused(refusal.reason, refusal.detail)
            log.info("refused for now: %s", refusal.detail)
        elif kind == "farewell":
            self.over = not message.farewell.reconnect

    def _welcome(self, welcome: pb.Welcome, ids: list[int]) -> None:
        if welcome.protocol != PROTOCOL_VERSION:
            raise NodeRefused(
                "wrong-version",
                f"this client is turnout {package_version()} with protocol {PROTOCOL_VERSION}, the server "
                f"is turnout {welcome.package_version[:32]} with protocol {welcome.protocol}; install the "
                "same version.",
            )
        ids[:] = welcome.ids
        config = decode_scalars(welcome.run_config)
        self._board.welcome(Federation(welcome.run, welcome.num_clients, config), ids)
        self.welcomed = True
        self._options.watch.connected(len(ids))
        for task in self._board.ready():
            self.offer_reply(task)
        self._counting = asyncio.create_task(self._tell_examples(ids))

    async def _tell_examples(self, ids: list[int]) -> None:
        counts = dict.fromkeys(ids, 0)  # Not known; the server must hear of it to choose without this node.
        try:
            if self._options.examples is not None:
                counts = await self._board.count_examples(ids, self._options.examples)
        except Exception as error:  # Whatever ails the app, its first task will say it with a traceback.
            log.warning("how many examples clients have is not known: %s", error)
        for client, number in counts.items():
            metrics = {keys.NUM_EXAMPLES: float(number)}
            self._send(progress=pb.Progress(client=client, metrics=metrics))

    def _upload(self, task_id: int) -> None:
        task = self._board.find(task_id)
        if task is not None and task.reply is not None:
            task.upload += 1
            self._outbox.stream(_frames(task, task.upload, task.reply.pieces))

    def _acknowledged(self, ack: pb.Ack) -> None:
        task = self._board.find(ack.task)
        if ack.outcome == pb.OUTCOME_RETRY and task is not None:
            task.upload += 1  # What is left of the last one must not follow the new offer.
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.offer_reply, task)
        else:
            self._board.acknowledged(ack)
            self._settled()


def _frames(task: NodeTask, upload: int, pieces: Sequence[memoryview]) -> Iterator[bytes]:
    """Yield the frames of a reply, until another upload of it begins or it is not wanted any more."""
    for frame in chunk_frames(task.offer.id, pieces):
        if task.upload != upload or task.cancelled:
            return
        yield frame
