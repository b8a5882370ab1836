"""Thousands of streams, each on a connection of its own: the fleet's, and bare ones beside them.

Both are parties (see `fleet_parties`) whose clients live in a few processes. The fleet's clients speak the
protocol by hand, without a node's threads and journals, so that the server is what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fleet_parties import Turns, children, memory_mb
from fleet_turnout import WAIT_SECONDS
from turnout.client.node import NodeOptions
from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import FedAvg, Instruction
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import as_array
from turnout.wire.event_loop import new_event_loop
from turnout.wire.framing import PROTOCOL_VERSION, decode_server, split_frames
from turnout.wire.replies import encode_reply
from turnout.wire.work import decode_work

PROCESSES = 4
CONNECTING = 64  # Streams that a client process opens at the same time.
SPARE_DESCRIPTORS = 500
SETTLE_SECONDS = 1.0
WELCOME = b"."


def raise_descriptors() -> int:
    """Allow as many open files as the system lets us; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


# Clients.


class Answers:
    """Replies of the fleet's clients: what all are asked is answered with bytes made once."""

    def __init__(self) -> None:
        self._made: dict[bytes, pb.Ready] = {}

    def to(self, offer: pb.TaskOffer) -> bytes:
        """Return the frame that answers ``offer``."""
        made = self._made.get(offer.work)
        if made is None:
            self._made.clear()
            made = self._made[offer.work] = self._make(offer.work)
        made.task, made.attempt = offer.id, offer.attempt
        raw: bytes = pb.ClientMessage(ready=made).SerializeToString()
        return raw

    def _make(self, raw: bytes) -> pb.Ready:
        asked = decode_work(pb.Work.FromString(raw), lambda payload: _too_large())
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        if asked.message_type.startswith("train"):
            content["arrays"] = asked.content["arrays"]
        reply = encode_reply(content, asked.layouts)
        body = b"".join(reply.pieces)
        return pb.Ready(head=reply.head, size=reply.size, checksum=reply.checksum, data=body)


def _too_large() -> Any:
    raise RuntimeError("these clients take models that travel inside the offer only.")


async def _fleet_client(call: Any, client: int, answers: Answers) -> None:
    """Greet and wait for the welcome."""
    hello = pb.Hello(protocol=PROTOCOL_VERSION, name=f"c{client}")
    hello.clients.add(partition=client)
    await call.write(pb.ClientMessage(hello=hello).SerializeToString())
    message: Any = decode_server(await call.read())
    if message.WhichOneof("body") == "batch":
        message = next(split_frames(message.batch, pb.ServerMessage))
    if message.WhichOneof("body") != "welcome":
        raise RuntimeError(f"client {client} was not welcome: {message}")


async def _fleet_answers(call: Any, answers: Answers) -> None:
    while (raw := await call.read()) is not grpc.aio.EOF:
        message: Any = decode_server(raw)
        parts: Sequence[Any] = [message]
        if message.WhichOneof("body") == "batch":
            parts = list(split_frames(message.batch, pb.ServerMessage))
        for part in parts:
            if part.WhichOneof("body") == "task":
                await call.write(answers.to(part.task))


async def _bare_client(call: Any, client: int, answers: Answers) -> None:
    await call.write(b"hello")
    await call.read()


async def _bare_answers(call: Any, answers: Answers) -> None:
    while await call.read() is not grpc.aio.EOF:
        await call.write(WELCOME)


Greet = Callable[[Any, int, Answers], Awaitable[None]]
Serve = Callable[[Any, Answers], Awaitable[None]]


async def _clients(address: str, method: str, clients: Sequence[int], greet: Greet, serve: Serve) -> None:
    settings = NodeOptions(name="c").channel()
    gate, answers = asyncio.Semaphore(CONNECTING), Answers()

    async def one(client: int) -> None:
        async with gate:
            channel = grpc.aio.insecure_channel(address, settings)
            call: Any = channel.stream_stream(method)()
            await greet(call, client, answers)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await serve(call, answers)
        await channel.close()

    await asyncio.gather(*(one(client) for client in clients))


def fleet_clients(address: str, clients: Sequence[int]) -> None:
    raise_descriptors()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_clients(address, "/turnout.v1.Fleet/Connect", clients, _fleet_client, _fleet_answers))


def bare_clients(address: str, clients: Sequence[int]) -> None:
    raise_descriptors()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_clients(address, "/bare/Connect", clients, _bare_client, _bare_answers))


def _processes(target: Callable[..., None], address: str, clients: int) -> Any:
    return children([(target, (address, range(i, clients, PROCESSES))) for i in range(PROCESSES)])


# Servers.


class Sampled(FedAvg):
    """FedAvg that asks ``cohort`` clients at random."""

    cohort = 1

    def select(self, server_round: int, available: Sequence[int]) -> dict[int, Instruction]:
        chosen = self.rng(server_round).choice(len(available), self.cohort, replace=False)
        everyone = Instruction()
        return {available[i]: everyone for i in sorted(chosen)}


def small_model(nbytes: int) -> ArrayRecord:
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.random.default_rng(0).standard_normal(nbytes // 4, np.float32))
    return arrays


def fleet_streams(turns: Turns, clients: int, nbytes: int, cohort: int, rounds: int) -> None:
    """One FleetServer. ``go`` pushes a model to all; ``rounds`` runs FedAvg over random cohorts."""
    logging.basicConfig(level="ERROR")
    raise_descriptors()
    with FleetServer(num_clients=clients) as server:
        before = memory_mb()
        with _processes(fleet_clients, server.address, clients):
            grid = FleetGrid(server, min_clients=1, wait=WAIT_SECONDS)
            grid.get_node_ids()
            # The first client is there: what follows is not the start of the processes.
            began, cpu = time.perf_counter(), time.process_time()
            first = len(grid.available_ids())
            everyone = FleetGrid(server, min_clients=clients, wait=WAIT_SECONDS)
            everyone.start_round(1)
            _connected(turns, clients, first, before, began, cpu)
            opened = _noting_open(server)
            arrays = small_model(nbytes)
            while asked := turns.wait():
                if asked == "rounds":
                    turns.answer(**_rounds(everyone, clients, arrays, cohort, rounds))
                    continue
                began, cpu = time.perf_counter(), time.process_time()
                content = RecordDict({"arrays": arrays})
                requests = [
                    everyone.create_message(content, "query", i, "1") for i in everyone.get_node_ids()
                ]
                bad = sum(r.has_error() for r in everyone.send_and_receive(requests, timeout=WAIT_SECONDS))
                ended = time.perf_counter()
                if bad or len(requests) != clients:
                    raise RuntimeError(f"{len(requests)} clients were asked, {bad} failed.")
                turns.answer(
                    seconds=ended - began, transport=ended - opened[-1], cpu=time.process_time() - cpu
                )
            server.stop(grace=1)


def _connected(turns: Turns, clients: int, first: int, before: float, began: float, cpu: float) -> None:
    """Say that all streams are there, how fast they came and what one costs in memory."""
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    time.sleep(SETTLE_SECONDS)
    turns.ready(
        connect_s=seconds * clients / max(1, clients - first),
        connect_cpu_s=cpu,
        kb_per_stream=(memory_mb() - before) * 1000 / clients,
        rss_mb=memory_mb(),
    )


def _noting_open(server: FleetServer) -> list[float]:
    """Return the list of moments at which requests reach the event loop."""
    opened: list[float] = []
    open_exchange = server.hub.open

    def note(exchange: Any) -> None:
        opened.append(time.perf_counter())
        open_exchange(exchange)

    server.hub.open = note  # type: ignore[method-assign]
    return opened


def _rounds(grid: FleetGrid, clients: int, arrays: ArrayRecord, cohort: int, rounds: int) -> dict[str, float]:
    strategy = Sampled(num_clients=clients)
    strategy.cohort = cohort
    errors = 0

    class Count(CommitCallback):
        def on_round_end(self, report: Any) -> None:
            nonlocal errors
            errors += cohort - sum(row.outcome == "ok" for row in report.clients)
            super().on_round_end(report)

    began = time.perf_counter()
    strategy.start(grid, arrays, num_rounds=rounds, timeout=WAIT_SECONDS, callbacks=[Count(grid)])
    seconds = (time.perf_counter() - began) / rounds
    lost = grid.server.counters.disconnects
    return {"seconds": seconds, "errors": float(errors), "lost_streams": float(lost)}


def bare_streams(turns: Turns, clients: int, nbytes: int) -> None:
    """Streams on a server with the fleet's options. ``go`` writes ``nbytes`` to all; each answers."""
    raise_descriptors()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_bare_streams(turns, clients, nbytes))


async def _bare_streams(turns: Turns, clients: int, nbytes: int) -> None:
    streams: list[Any] = []
    one, complete, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def connect(_: object, context: Any) -> None:
        await context.read()
        await context.write(WELCOME)
        streams.append(context)
        one.set()
        if len(streams) == clients:
            complete.set()
        await done.wait()

    server = grpc.aio.server(options=FleetOptions().channel())
    handler = grpc.stream_stream_rpc_method_handler(connect)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Connect": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    before = memory_mb()
    payload = np.random.default_rng(0).bytes(nbytes)

    async def push(stream: Any) -> None:
        await stream.write(payload)
        await stream.read()

    with _processes(bare_clients, f"127.0.0.1:{port}", clients):
        await one.wait()
        began, cpu, first = time.perf_counter(), time.process_time(), len(streams)
        await complete.wait()
        _connected(turns, clients, first, before, began, cpu)
        while await asyncio.to_thread(turns.wait):
            began, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(push(stream) for stream in streams))
            turns.answer(seconds=time.perf_counter() - began, cpu=time.process_time() - cpu)
        done.set()
        await server.stop(1)
