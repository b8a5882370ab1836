"""Uploads with checks and fold, beside raw TCP and bare gRPC in the same run; server memory against the
cohort.

Prints one JSON line. Throughput is GB/s (1e9 bytes) from the first upload offered to the last reply folded;
the medians of several rounds are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.server.fleet.options import FleetOptions
from turnout.server.fleet.server import new_event_loop
from turnout.strategies import FedAvg
from turnout.wire import as_array

MB = 1_000_000
SPAWN = multiprocessing.get_context("spawn")


def aligned_start() -> None:
    """Sleep to the next common moment, so that all clients upload together."""
    time.sleep(-time.time() % 0.5 + 0.25)


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        aligned_start()
        metrics = MetricRecord({"num-examples": 1, "client-id": context.node_id})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    return app


def fleet_client(address: str, clients: list[int]) -> None:
    from turnout.client.node import run_node

    run_node(address, echo(), clients, name=f"n{clients[0]}", workers=min(4, len(clients)))


def fleet(clients: int, nbytes: int, rounds: int, processes: int) -> list[float]:
    """Return GB/s of each round's uploads."""
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.ones(nbytes // 4, np.float32))
    begun: list[float] = []
    ended: list[float] = []
    with FleetServer(num_clients=clients) as server:
        enqueue, decide = server.hub.slots.enqueue, server.hub.decide

        def first(task: Any) -> None:
            if len(begun) == len(ended):
                begun.append(time.perf_counter())
            enqueue(task)

        last = [0.0]

        def judged(verdicts: Any) -> None:
            last[0] = time.perf_counter()
            decide(verdicts)

        server.hub.slots.enqueue, server.hub.decide = first, judged  # type: ignore[method-assign]
        parts = [list(range(clients))[i::processes] for i in range(processes)]
        workers = [SPAWN.Process(target=fleet_client, args=(server.address, part)) for part in parts]
        for worker in workers:
            worker.start()
        grid = FleetGrid(server, min_clients=clients, wait=120)

        class Clock(CommitCallback):
            def on_round_end(self, report: Any) -> None:
                assert all(row.outcome == "ok" for row in report.clients)
                ended.append(last[0])
                super().on_round_end(report)

        FedAvg(num_clients=clients).start(
            grid, arrays, num_rounds=rounds, timeout=300, callbacks=[Clock(grid)]
        )
    for worker in workers:
        worker.join(20)
    return [clients * nbytes / 1e9 / (b - a) for a, b in zip(begun, ended, strict=True)][1:]


def tcp_client(port: int, nbytes: int, rounds: int) -> None:
    block = bytes(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as peer:
        for _ in range(rounds):
            aligned_start()
            for _ in range(nbytes // len(block)):
                peer.sendall(block)
            peer.recv(1)


def tcp(clients: int, nbytes: int, rounds: int) -> list[float]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    nbytes -= nbytes % (1 << 20)
    workers = [SPAWN.Process(target=tcp_client, args=(port, nbytes, rounds)) for _ in range(clients)]
    for worker in workers:
        worker.start()
    peers = [listener.accept()[0] for _ in range(clients)]
    figures = []
    for _ in range(rounds):
        spans: list[tuple[float, float]] = []

        def read(peer: socket.socket, spans: list[tuple[float, float]] = spans) -> None:
            block, left, begun = bytearray(1 << 20), nbytes, 0.0
            while left:
                left -= peer.recv_into(block, min(left, len(block)))
                begun = begun or time.perf_counter()
            spans.append((begun, time.perf_counter()))

        threads = [threading.Thread(target=read, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
        figures.append(clients * nbytes / 1e9 / seconds)
        for peer in peers:
            peer.sendall(b".")
    for worker in workers:
        worker.join()
    return figures[1:]


def bare_client(address: str, nbytes: int, rounds: int) -> None:
    async def main() -> None:
        block = bytes(1 << 20)
        call: Any = grpc.aio.insecure_channel(address).stream_stream("/bare/Send")()
        await call.write(b"hello")
        for _ in range(rounds):
            await asyncio.to_thread(aligned_start)
            for _ in range(nbytes // len(block)):
                await call.write(block)
            await call.read()

    asyncio.run(main())


async def _bare(clients: int, nbytes: int, rounds: int, pipe: Connection) -> None:
    nbytes -= nbytes % (1 << 20)
    spans: asyncio.Queue[tuple[float, float]] = asyncio.Queue()
    streams: list[Any] = []

    async def send(_: object, context: Any) -> None:
        await context.read()
        streams.append(context)
        for _ in range(rounds):
            left, begun = nbytes, 0.0
            while left:
                left -= len(await context.read())
                begun = begun or time.perf_counter()
            spans.put_nowait((begun, time.perf_counter()))
            await context.write(b".")

    server = grpc.aio.server(options=FleetOptions().channel())
    handler = grpc.stream_stream_rpc_method_handler(send)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Send": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    workers = [SPAWN.Process(target=bare_client, args=(address, nbytes, rounds)) for _ in range(clients)]
    for worker in workers:
        worker.start()
    figures = []
    for _ in range(rounds):
        part = [await spans.get() for _ in range(clients)]
        seconds = max(end for _, end in part) - min(begin for begin, _ in part)
        figures.append(clients * nbytes / 1e9 / seconds)
    pipe.send(figures[1:])
    await server.stop(1)
    for worker in workers:
        worker.join(20)


def bare_main(clients: int, nbytes: int, rounds: int, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_bare(clients, nbytes, rounds, pipe))


def rss_main(clients: int, nbytes: int, pipe: Connection) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        fleet(clients, nbytes, 2, 2)
    # Not getrusage: its peak includes the process that this one was forked from.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    pipe.send(int(peak.split()[1]) / 1024)


def apart(target: Any, *arguments: Any) -> Any:
    """Return what ``target`` sends from a process of its own."""
    mine, theirs = SPAWN.Pipe()
    worker = SPAWN.Process(target=target, args=(*arguments, theirs))
    worker.start()
    result = mine.recv()
    worker.join(30)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cohorts", type=int, nargs="*", default=[4, 32])
    options = parser.parse_args()
    size, rows = options.megabytes * MB, []
    for clients in (1, 4):
        wire = statistics.median(tcp(clients, size, options.rounds))
        limit = statistics.median(apart(bare_main, clients, size, options.rounds))
        ours = statistics.median(fleet(clients, size, options.rounds, clients))
        row = {"clients": clients, "gb_per_s": ours, "tcp_gb_per_s": wire, "bare_grpc_gb_per_s": limit}
        row |= {"of_tcp": ours / wire, "of_bare_grpc": ours / limit}
        rows.append({name: round(value, 3) for name, value in row.items()})
        print(rows[-1], file=sys.stderr)
    memory = {str(n): round(apart(rss_main, n, 40 * MB), 1) for n in options.cohorts}
    peaks = list(memory.values())
    result = {"benchmark": "fleet-throughput", "megabytes": options.megabytes, "rows": rows,
              "server_peak_rss_mb_by_cohort_of_40_mb": memory}  # fmt: skip
    if len(peaks) > 1:
        result["rss_last_over_first"] = round(peaks[-1] / peaks[0], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
