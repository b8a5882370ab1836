"""The gRPC service: one coroutine per stream that greets a node and hands its messages to the hub."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc

from turnout.server.fleet.connection import Connection
from turnout.server.fleet.hub import Hub
from turnout.server.fleet.identity import certificate_names, peer_certificate
from turnout.server.fleet.revocation import RevocationList
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.errors import ReplyRejected
from turnout.wire.framing import PROTOCOL_VERSION, Chunk, FrameError, decode_client
from turnout.wire.scalars import encode_scalars
from turnout.wire.version import package_version

log = logging.getLogger("turnout.server.fleet")
security = logging.getLogger("turnout.server.fleet.security")

SERVICE: Final = "turnout.v1.Fleet"
# Refusals that say nothing of ill will, and those that end by themselves.
_EVERYDAY: Final = ("wrong-version", "draining", "bad-hello")
_PASSING: Final = ("draining", "already-connected")
CAPABILITIES: Final = ("crc32", "inline", "shared-payloads")
Incoming = Chunk | pb.ClientMessage | FrameError


class FleetServicer:
    """Serves ``turnout.v1.Fleet``; lives on the event loop of its server."""

    def __init__(
        self,
        hub: Hub,
        *,
        run: str,
        num_clients: int,
        run_config: Mapping[str, Any],
        secure: bool,
        revocations: RevocationList,
    ) -> None:
        self._hub = hub
        self._welcome = pb.Welcome(
            protocol=PROTOCOL_VERSION,
            package_version=package_version(),
            run=run,
            num_clients=num_clients,
            run_config=encode_scalars(run_config),
            capabilities=CAPABILITIES,
        )
        self._secure = secure
        self._revocations = revocations
        self.draining = False

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the method table, with our own reading of frames."""
        connect = grpc.stream_stream_rpc_method_handler(
            self.connect, request_deserializer=_read, response_serializer=None
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Connect": connect})

    async def connect(self, _: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Serve one stream until either side ends it."""
        connection, hello = await self._greet(context)
        writer = asyncio.create_task(connection.outbox.run(context.write))
        writer.add_done_callback(lambda _: connection.stop_handler())
        welcome = pb.Welcome(ids=connection.ids)
        welcome.MergeFrom(self._welcome)
        connection.send(welcome=welcome)
        self._hub.attach(connection, [list(client.holding) for client in hello.clients])
        try:
            await self._read_on(connection, context)
        except asyncio.CancelledError:
            if not connection.closing:
                raise
        except FrameError as error:
            connection.reading = False
            self._hub.offend(connection, "bad-frame")
            connection.close(refusal=pb.Refusal(reason="bad-frame", detail=str(error)[:500]))
            await asyncio.wait({writer}, timeout=1)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:500])
        finally:
            connection.reading = False
            self._hub.detach(connection)
            writer.cancel()

    async def _read_on(self, connection: Connection, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        receive, read = self._hub.receive, context.read
        while True:
            message: Any = await read()
            if isinstance(message, FrameError):
                raise message
            if message is grpc.aio.EOF:
                return
            receive(connection, message)

    async def _greet(self, context: grpc.aio.ServicerContext[Any, Any]) -> tuple[Connection, pb.Hello]:
        """Return the connection of an admitted node; end the stream with the reason for any other."""
        try:
            first: Any = await asyncio.wait_for(context.read(), self._hub.options.hello)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came in time.")
        if not isinstance(first, pb.ClientMessage) or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello.")
        hello = first.hello
        try:
            self._check(hello, context)
            numbers = [c.partition if c.HasField("partition") else None for c in hello.clients]
            self._check_numbers(numbers)
            ids = self._hub.roster.admit(hello.name, numbers)
            self._check_alone(ids, hello, context)
        except ReplyRejected as refused:
            self._hub.counters.reasons[refused.reason] += 1
            teller = log if refused.reason in _EVERYDAY else security
            teller.warning(
                "refused %.64r from %s, %s: %s", hello.name, context.peer(), refused.reason, refused
            )
            retry = refused.reason in _PASSING
            refusal = pb.Refusal(reason=refused.reason, detail=str(refused)[:500], retry=retry)
            with contextlib.suppress(TimeoutError):
                told = context.write(pb.ServerMessage(refusal=refusal).SerializeToString())
                await asyncio.wait_for(told, self._hub.options.hello)
            code = grpc.StatusCode.UNAVAILABLE if retry else grpc.StatusCode.PERMISSION_DENIED
            await context.abort(code, f"{refused.reason}: {refused}"[:500])
        for client, said in zip(ids, hello.clients, strict=True):
            self._hub.roster.describe(
                client, device=hello.device, examples=said.examples, tags=dict(said.tags)
            )
        return Connection(hello.name, ids, context.peer()), hello

    def _check(self, hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise ReplyRejected(
                "wrong-version",
                f"this server is turnout {package_version()} with protocol {PROTOCOL_VERSION}, the client is "
                f"turnout {hello.package_version[:32]} with protocol {hello.protocol}; install the same "
                "version.",
            )
        if self.draining:
            raise ReplyRejected("draining", "the server is shutting down.")
        if not 1 <= len(hello.clients) <= self._hub.options.max_clients_per_connection:
            raise ReplyRejected("bad-hello", f"{len(hello.clients)} clients on one stream.")
        if self._secure:
            names = certificate_names(context.auth_context())
            if hello.name not in names:
                raise ReplyRejected(
                    "wrong-name", f"the certificate is for {sorted(names)[:3]}, not for {hello.name[:64]!r}."
                )
        self.apply_revocations()
        if self._revocations.refuses(hello.name, peer_certificate(context.auth_context())):
            raise ReplyRejected("revoked", f"{hello.name!r} has been revoked.")

    def apply_revocations(self) -> None:
        """Cut off the streams of names that have been revoked since the last look."""
        for name in self._revocations.reread():
            security.warning("%r is revoked.", name)
            self._hub.revoke(name)
            # From here on the list decides: a certificate that is issued later is good again.
            self._hub.roster.readmit(name)

    def _check_numbers(self, numbers: Sequence[int | None]) -> None:
        known = self._welcome.num_clients
        beyond = [number for number in numbers if number is not None and number >= known > 0]
        if beyond:
            raise ReplyRejected(
                "unknown-partition", f"client {beyond[0]} is none of the experiment's, 0 to {known - 1}."
            )

    def _check_alone(
        self, ids: Sequence[int], hello: pb.Hello, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Raise the alarm when one of ``ids`` has a stream already; refuse the newer one if so configured."""
        held = [self._hub.connections[client] for client in ids if client in self._hub.connections]
        if not held:
            return
        refuse = self._hub.options.same_identity == "refuse"
        ending = "newer stream is refused" if refuse else "older stream is closed"
        security.warning(
            "%r connects from %s while it is connected from %s: either it came back before its stream was "
            "missed, or its key is in use twice; the %s.",
            hello.name,
            context.peer(),
            held[0].peer,
            ending,
        )
        if refuse:
            raise ReplyRejected("already-connected", f"{hello.name!r} is connected from {held[0].peer}.")


def _read(raw: bytes) -> Incoming:
    """Decode without raising: an exception here would end the stream without a reason."""
    try:
        return decode_client(raw)
    except FrameError as error:
        return error
