"""What the fleet is measured against: sockets, TLS sockets and bare gRPC moving the same bytes.

Each function is a party (see `fleet_parties`): it serves ``clients`` processes and, per turn, lets them all
send ``nbytes`` at the same moment. A turn's time is from that signal to the last byte received.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fleet_parties import Turns, children, memory_mb, reset_peak
from turnout.client.node import ClientTls, NodeOptions
from turnout.server.fleet import FleetOptions, ServerTls
from turnout.server.fleet.certs import create_authority, create_client, create_server
from turnout.wire.event_loop import new_event_loop
from turnout.wire.framing import chunk_frames

BLOCK = 1 << 20
GO = b"."


@dataclass(frozen=True)
class Certificates:
    """A directory with an authority, a server's certificate and those of ``clients`` nodes n0, n1, ..."""

    directory: Path

    @classmethod
    def create(cls, directory: Path, clients: int) -> Certificates:
        create_authority(directory)
        create_server(directory, ["127.0.0.1", "localhost"])
        for client in range(clients):
            create_client(directory, f"n{client}")
        return cls(directory)

    def server(self) -> ServerTls:
        place = self.directory
        return ServerTls(place / "server.pem", place / "server.key", place / "ca.pem")

    def client(self, name: str) -> ClientTls:
        place = self.directory
        return ClientTls(place / "ca.pem", place / f"{name}.pem", place / f"{name}.key")

    def context(self, name: str, purpose: ssl.Purpose) -> ssl.SSLContext:
        """Return Python's own TLS, mutual as well; ``purpose`` is what the peer is for."""
        context = ssl.create_default_context(purpose, cafile=str(self.directory / "ca.pem"))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        return context


# Sockets.


def _socket_client(port: int, nbytes: int, certificates: Certificates | None) -> None:
    block = memoryview(bytes(BLOCK))
    plain = socket.create_connection(("127.0.0.1", port))
    peer = plain
    if certificates is not None:
        context = certificates.context("n0", ssl.Purpose.SERVER_AUTH)
        peer = context.wrap_socket(plain, server_hostname="127.0.0.1")
    with peer:
        while peer.recv(1):
            left = nbytes
            while left:
                peer.sendall(block[: min(left, BLOCK)])
                left -= min(left, BLOCK)


def _accept(listener: socket.socket, context: ssl.SSLContext | None) -> socket.socket:
    peer = listener.accept()[0]
    return peer if context is None else context.wrap_socket(peer, server_side=True)


def _drain(peer: socket.socket, nbytes: int) -> None:
    block, left = bytearray(BLOCK), nbytes
    while left:
        got = peer.recv_into(block, min(left, BLOCK))
        if not got:
            raise EOFError("a sender went away.")
        left -= got


def sockets(turns: Turns, clients: int, nbytes: int, certificates: Certificates | None = None) -> None:
    """Plain TCP, or Python's ``ssl`` with certificates on both sides; one thread reads each socket."""
    context = None if certificates is None else certificates.context("server", ssl.Purpose.CLIENT_AUTH)
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        port = listener.getsockname()[1]
        stack.enter_context(children([(_socket_client, (port, nbytes, certificates))] * clients))
        # Entered later, so closed before the clients are waited for.
        peers = [stack.enter_context(_accept(listener, context)) for _ in range(clients)]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(clients))
        turns.ready()
        while turns.wait():
            began, cpu = time.perf_counter(), time.process_time()
            for peer in peers:
                peer.sendall(GO)
            list(pool.map(_drain, peers, [nbytes] * clients))
            turns.answer(seconds=time.perf_counter() - began, cpu=time.process_time() - cpu)


# gRPC without anything of ours but the frames and the options.

Serve = Callable[[list[Any]], Awaitable[None]]


def _grpc_client(address: str, name: str, nbytes: int, receives: bool, tls: ClientTls | None) -> None:
    asyncio.run(_grpc_client_main(address, name, nbytes, receives, tls))


async def _grpc_client_main(
    address: str, name: str, nbytes: int, receives: bool, tls: ClientTls | None
) -> None:
    settings = NodeOptions(name=name).channel()
    channel = (
        grpc.aio.insecure_channel(address, settings)
        if tls is None
        else grpc.aio.secure_channel(address, tls.credentials(), settings)
    )
    async with channel:
        call: Any = channel.stream_stream("/bare/Move")()
        await call.write(b"hello")
        frames = [] if receives else frames_of(nbytes)
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (frame := await call.read()) is not grpc.aio.EOF:
                if not receives:
                    for sent in frames:
                        await call.write(sent)
                    continue
                got = len(frame)
                while got < nbytes:
                    got += len(await call.read())
                await call.write(GO)


def frames_of(nbytes: int) -> list[bytes]:
    """Return the frames in which ``nbytes`` travel."""
    return list(chunk_frames(1, [memoryview(bytes(nbytes))]))


async def _serve(
    turns: Turns, clients: int, nbytes: int, receives: bool, certificates: Certificates | None, turn: Serve
) -> None:
    """Run one ``turn`` with the open streams each time it is asked for."""
    streams: list[Any] = []
    complete, done = asyncio.Event(), asyncio.Event()

    async def move(_: object, context: Any) -> None:
        await context.read()
        streams.append(context)
        if len(streams) == clients:
            complete.set()
        await done.wait()

    server = grpc.aio.server(options=FleetOptions().channel())
    handler = grpc.stream_stream_rpc_method_handler(move)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Move": handler}),))
    if certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", certificates.server().credentials())
    await server.start()
    calls = []
    for client in range(clients):
        tls = None if certificates is None else certificates.client(f"n{client}")
        calls.append((_grpc_client, (f"127.0.0.1:{port}", f"n{client}", nbytes, receives, tls)))
    with children(calls):
        await complete.wait()
        turns.ready()
        while await asyncio.to_thread(turns.wait):
            reset_peak()
            before = memory_mb()
            began, cpu = time.perf_counter(), time.process_time()
            await turn(streams)
            figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
            turns.answer(growth_mb=memory_mb("VmHWM") - before, **figures)
        done.set()
        await server.stop(1)


def _run(main: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


def grpc_upload(turns: Turns, clients: int, nbytes: int, certificates: Certificates | None = None) -> None:
    """Every client sends the frames of ``nbytes``; the server reads them and lets them go."""
    total = sum(len(frame) for frame in frames_of(nbytes))

    async def drain(stream: Any) -> None:
        left, read = total, stream.read
        while left:
            left -= len(await read())

    async def turn(streams: list[Any]) -> None:
        for stream in streams:
            await stream.write(GO)
        await asyncio.gather(*(drain(stream) for stream in streams))

    _run(lambda: _serve(turns, clients, nbytes, False, certificates, turn))


def grpc_broadcast(turns: Turns, clients: int, nbytes: int) -> None:
    """The server sends every client the same list of frames; each answers when it has them all."""
    frames = frames_of(nbytes)
    total = sum(len(frame) for frame in frames)

    async def send(stream: Any) -> None:
        for frame in frames:
            await stream.write(frame)
        await stream.read()

    async def turn(streams: list[Any]) -> None:
        await asyncio.gather(*(send(stream) for stream in streams))

    _run(lambda: _serve(turns, clients, total, True, None, turn))
