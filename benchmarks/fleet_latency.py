"""Rounds of a tiny model without training, beside a bare gRPC ping-pong over as many streams in the same run.

    python benchmarks/fleet_latency.py [--clients 1 2 10 100] [--turns 5] [--quick]

Prints one JSON line: per number of clients the round's p50 and p99, the bare p50 and their ratio, and the
same for one client that is asked while the others are idle. Every client is a connection of its own; the
clients live in two processes, as the bare streams do. Both sides take turns; a figure is the median of the
turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import grpc
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fleet_parties import SPAWN, Party, Sample, Turns, children, paired, rounded
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.wire import as_array
from turnout.wire.event_loop import new_event_loop

PARAMETERS, PROCESSES = 250, 2
WAIT_SECONDS = 120.0
TARGETS = {2: {"round_ms": "<= 5"}, 100: {"ratio": "<= 3", "one_active_ratio": "<= 1.5"}}


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "client-id": context.node_id})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


def parts(number: int) -> list[list[int]]:
    return [part for part in (list(range(number))[i::PROCESSES] for i in range(PROCESSES)) if part]


def figures(rounds: list[float], singles: list[float]) -> Sample:
    return {
        "seconds": statistics.median(rounds),
        "p99": float(np.quantile(rounds, 0.99)),
        "one_active": statistics.median(singles),
    }


def fleet_clients(address: str, clients: list[int]) -> None:
    from turnout.client.node import Node, NodeOptions

    async def main() -> None:
        nodes = [Node(address, echo(), NodeOptions(name=f"n{c}", clients=[c])) for c in clients]
        await asyncio.gather(*(node.run() for node in nodes))

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


class TurnOver(Exception):  # noqa: N818 - not an error
    """No more turns are asked for."""


class Clock(Callback):
    """Times the rounds of a run; after ``rounds`` of them it answers, and waits for its next turn."""

    def __init__(self, turns: Turns, grid: FleetGrid, rounds: int) -> None:
        self._turns, self._grid, self._rounds = turns, grid, rounds

    def begin(self) -> None:
        self._times = [time.perf_counter()]

    def on_round_end(self, report: RoundReport) -> None:
        self._times.append(time.perf_counter())
        if len(self._times) <= self._rounds:
            return
        assert all(client.outcome == "ok" for client in report.clients)
        self._turns.answer(
            **figures(np.diff(self._times).tolist(), [self._ask() for _ in range(self._rounds)])
        )
        if not self._turns.wait():
            raise TurnOver
        self.begin()

    def _ask(self) -> float:
        content = RecordDict({"config": ConfigRecord({"padding": bytes(4 * PARAMETERS)})})
        began = time.perf_counter()
        [answer] = self._grid.send_and_receive([self._grid.create_message(content, "query", 0, "one")])
        assert not answer.has_error()
        return time.perf_counter() - began


def fleet(turns: Turns, clients: int, rounds: int) -> None:
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(PARAMETERS, np.float32))
    with (
        FleetServer(num_clients=clients) as server,
        children([(fleet_clients, (server.address, part)) for part in parts(clients)]),
    ):
        grid = FleetGrid(server, min_clients=clients, wait=WAIT_SECONDS)
        grid.get_node_ids()
        turns.ready()
        clock = Clock(turns, grid, rounds)
        if turns.wait():
            clock.begin()
            try:
                strategy = FedAvg(num_clients=clients)
                strategy.start(grid, arrays, num_rounds=1 << 30, callbacks=[CommitCallback(grid), clock])
            except TurnOver:
                pass
        server.stop(grace=1)  # Its nodes end with it; for those of a server that goes on, one waits.


async def _bare_client(address: str, streams: int) -> None:
    channels = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(streams)
    ]

    async def pong(channel: grpc.aio.Channel) -> None:
        call: Any = channel.stream_stream("/bare/Ping", request_serializer=None, response_deserializer=None)()
        await call.write(b"hello")
        while (data := await call.read()) is not grpc.aio.EOF:
            await call.write(data)

    await asyncio.gather(*(pong(channel) for channel in channels), return_exceptions=True)


def bare_clients(address: str, clients: list[int]) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_bare_client(address, len(clients)))


class BarePing:
    """A gRPC server that keeps its streams and pings them."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self._replies: asyncio.Queue[bytes] = asyncio.Queue()
        self._closed = asyncio.Event()

    async def start(self) -> str:
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bare", {"Ping": handler}),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _serve(self, _: object, context: Any) -> None:
        await context.read()
        self.streams.append(context)
        while (data := await context.read()) is not grpc.aio.EOF:
            self._replies.put_nowait(data)

    async def ping(self, streams: list[Any]) -> float:
        payload = bytes(4 * PARAMETERS)
        began = time.perf_counter()
        await asyncio.gather(*(stream.write(payload) for stream in streams))
        for _ in streams:
            await self._replies.get()
        return time.perf_counter() - began

    async def stop(self) -> None:
        await self._server.stop(None)


async def _bare(turns: Turns, streams: int, rounds: int) -> None:
    server = BarePing()
    address = await server.start()
    workers = [
        SPAWN.Process(target=bare_clients, args=(address, part), daemon=True) for part in parts(streams)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + WAIT_SECONDS
    while len(server.streams) < streams:
        assert time.monotonic() < deadline, f"{len(server.streams)} of {streams} streams came"
        await asyncio.sleep(0.01)
    turns.ready()
    while await asyncio.to_thread(turns.wait):
        together = [await server.ping(server.streams) for _ in range(rounds)]
        turns.answer(**figures(together, [await server.ping(server.streams[:1]) for _ in range(rounds)]))
    for worker in workers:
        worker.terminate()
    await server.stop()


def bare(turns: Turns, streams: int, rounds: int) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_bare(turns, streams, rounds))


def measure(clients: int, rounds: int, turns: int) -> dict[str, Any]:
    """Return the row of one number of clients."""
    ours: list[Sample] = []
    limit: list[Sample] = []
    with Party(fleet, clients, rounds) as first, Party(bare, clients, rounds) as second:
        first.ready()
        second.ready()
        for turn in range(-1, turns):
            samples = first.round(), second.round()
            if turn >= 0:  # The first only warms up.
                ours.append(samples[0])
                limit.append(samples[1])
    row: dict[str, Any] = {
        "clients": clients,
        "round_p50_ms": 1e3 * statistics.median(s["seconds"] for s in ours),
        "round_p99_ms": 1e3 * statistics.median(s["p99"] for s in ours),
        "bare_p50_ms": 1e3 * statistics.median(s["seconds"] for s in limit),
        "ratio": paired(ours, limit),
        "one_active_ms": 1e3 * statistics.median(s["one_active"] for s in ours),
        "bare_one_active_ms": 1e3 * statistics.median(s["one_active"] for s in limit),
        "one_active_ratio": paired(ours, limit, "one_active"),
    }
    return rounded(row) | {"targets": TARGETS.get(clients, {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 10, 100])
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--quick", action="store_true", help="1 and 4 clients, 2 short turns")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.turns = [1, 4], 2
    rows = []
    for clients in options.clients:
        rows.append(measure(clients, 10 if options.quick else 60 if clients <= 10 else 30, options.turns))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "fleet-latency", "parameters": PARAMETERS, "rows": rows}))


if __name__ == "__main__":
    main()
