"""Rounds of a tiny model without training, beside a bare gRPC ping-pong over as many streams in the same run.

Prints one JSON line: per number of clients the round's p50 and p99, the bare p50 and their ratio. Every
client is a connection of its own; the clients live in two processes, as the bare streams do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.wire import as_array
from turnout.wire.event_loop import new_event_loop

PARAMETERS, PROCESSES = 250, 2


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "client-id": context.node_id})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    return app


def fleet_clients(address: str, clients: list[int]) -> None:
    from turnout.client.node import Node, NodeOptions

    async def main() -> None:
        nodes = [Node(address, echo(), NodeOptions(name=f"n{c}", clients=[c])) for c in clients]
        await asyncio.gather(*(node.run() for node in nodes))

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())


class Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.times.append(time.perf_counter())


def fleet(clients: int, rounds: int) -> list[float]:
    """Return the seconds of each round."""
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(PARAMETERS, np.float32))
    clock = Clock()
    with FleetServer(num_clients=clients) as server:
        parts = [list(range(clients))[i::PROCESSES] for i in range(PROCESSES)]
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=fleet_clients, args=(server.address, part)) for part in parts if part
        ]
        for worker in workers:
            worker.start()
        grid = FleetGrid(server, min_clients=clients, wait=120)
        strategy = FedAvg(num_clients=clients)
        strategy.start(grid, arrays, num_rounds=rounds, timeout=60, callbacks=[CommitCallback(grid), clock])
        assert all(report.outcome == "ok" for report in strategy.reports)
    for worker in workers:
        worker.join(20)
    return np.diff(clock.times)[rounds // 10 :].tolist()


async def _bare_client(address: str, streams: int) -> None:
    channels = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(streams)
    ]

    async def pong(channel: grpc.aio.Channel) -> None:
        call: Any = channel.stream_stream("/bare/Ping", request_serializer=None, response_deserializer=None)()
        await call.write(b"hello")
        while (data := await call.read()) is not grpc.aio.EOF:
            await call.write(data)

    await asyncio.gather(*(pong(channel) for channel in channels))


def bare_clients(address: str, streams: int) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_bare_client(address, streams))


async def _bare(streams: int, rounds: int, pipe: Connection) -> None:
    ready, replies, seconds = asyncio.Event(), asyncio.Queue[bytes](), list[float]()
    open_streams: list[Any] = []
    done = asyncio.Event()

    async def ping(_: object, context: Any) -> None:
        await context.read()
        open_streams.append(context)
        if len(open_streams) == streams:
            ready.set()
        while not done.is_set():
            data = await context.read()
            if data is grpc.aio.EOF:
                return
            replies.put_nowait(data)

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(ping)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Ping": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    parts = [streams // PROCESSES + (i < streams % PROCESSES) for i in range(PROCESSES)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=bare_clients, args=(f"127.0.0.1:{port}", n)) for n in parts if n]
    for worker in workers:
        worker.start()
    await ready.wait()
    payload = bytes(4 * PARAMETERS)
    for _ in range(rounds):
        began = time.perf_counter()
        await asyncio.gather(*(stream.write(payload) for stream in open_streams))
        for _ in range(streams):
            await replies.get()
        seconds.append(time.perf_counter() - began)
    pipe.send(seconds[rounds // 10 :])
    for worker in workers:
        worker.terminate()
    await server.stop(None)


def bare_main(streams: int, rounds: int, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_bare(streams, rounds, pipe))


def bare(streams: int, rounds: int) -> list[float]:
    """Return the seconds of each round of pings; in a process of its own, so that gRPC starts fresh."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    worker = context.Process(target=bare_main, args=(streams, rounds, theirs))
    worker.start()
    seconds: list[float] = mine.recv()
    worker.join(20)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 10, 100])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    rows = []
    for clients in options.clients:
        rounds = options.rounds if clients <= 10 else max(30, options.rounds // 4)
        limit = bare(clients, rounds)
        ours = fleet(clients, rounds)
        row = {
            "clients": clients,
            "round_p50_ms": 1e3 * statistics.median(ours),
            "round_p99_ms": 1e3 * float(np.quantile(ours, 0.99)),
            "bare_p50_ms": 1e3 * statistics.median(limit),
        }
        row["ratio"] = row["round_p50_ms"] / row["bare_p50_ms"]
        rows.append({name: round(value, 3) for name, value in row.items()})
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "fleet-latency", "parameters": PARAMETERS, "rows": rows}))


if __name__ == "__main__":
    main()
