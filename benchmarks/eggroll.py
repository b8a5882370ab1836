"""Bytes and memory of EGGROLL beside FedAvg, against the size of the model, and what it learns.

    python benchmarks/eggroll.py [--nodes 10] [--rounds 6] [--quick]
    python benchmarks/eggroll.py --quality 300 [--seed 0] [--quick]

Ten clients in ``--nodes`` processes train the digits over a real gRPC fleet. Every node's connection passes a
relay in this process, which counts the bytes of the TCP stream: all that travels, HTTP/2 and heartbeats
included. Figures are per client and round, from the second round on; what the first round takes more (the
model, for FedAvg) is a figure of its own. ``--quality ROUNDS`` trains the largest model in this process
instead, by EGGROLL and by FedAvg with one and with ten local steps, until it has an accuracy of 0.9 and on to
the last round (FedAvg stops there). ``--quick`` measures EGGROLL alone, on the largest model; ``--pairs``,
``--sigma`` and ``--server-lr`` are its settings. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eggroll_node import BATCH, WideDigits
from turnout.client import client_app
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.simulation import LocalGrid
from turnout.strategies import EGGROLL, Callback, FedAvg, RoundReport, StreamingStrategy

HERE = Path(__file__).parent
CLIENTS = 10
WIDTHS = ((64,), (320, 256), (1000, 950))
TUNED: dict[str, Any] = {"pairs": 128, "sigma": 1e-3, "server_lr": 6e-5}
"""EGGROLL's settings, for the largest model and with differences divided by their size."""
FEDAVG = {1: 0.6, 10: 0.15}
"""Local steps of FedAvg, and the learning rate that takes it to `BAND` soonest."""
BAND = 0.9
"""Accuracy that the largest model is to reach."""


class Relay:
    """Passes TCP streams on to ``target`` and counts the bytes each way."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self.up = self.down = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pass, args=(source, sink, way), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """Take no more streams."""
        self._listener.close()


class Rounds(Callback):
    """What had passed the relays at the end of each round, and when it was."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = relays
        self.up: list[int] = []
        self.down: list[int] = []
        self.ended: list[float] = []

    def on_round_end(self, report: RoundReport) -> None:
        """Note the bytes; a round in which a reply did not count is no measurement."""
        assert all(client.outcome == "ok" for client in report.clients), report.clients
        self.up.append(sum(relay.up for relay in self._relays))
        self.down.append(sum(relay.down for relay in self._relays))
        self.ended.append(time.perf_counter())


def strategy(method: str, settings: dict[str, Any], seed: int = 0) -> StreamingStrategy:
    """Return the strategy that is measured."""
    if method == "fedavg":
        return FedAvg(num_clients=CLIENTS, seed=seed)
    return EGGROLL(num_clients=CLIENTS, mode=method, normalise=True, seed=seed, **settings)


def federate(
    method: str, settings: dict[str, Any], widths: tuple[int, ...], nodes: int, rounds: int
) -> dict[str, Any]:
    """Return the figures of one method with one model."""
    task = WideDigits(widths)
    chosen = strategy(method, settings)
    with FleetServer(num_clients=CLIENTS) as server:
        relays = [Relay(server.address) for _ in range(nodes)]
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "eggroll_node.py"),
                    relay.address,
                    ",".join(str(client) for client in range(i, CLIENTS, nodes)),
                    f"node-{i}",
                    "-".join(str(width) for width in widths),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for i, relay in enumerate(relays)
        ]
        grid, counted = FleetGrid(server, min_clients=CLIENTS, wait=300), Rounds(relays)
        chosen.start(
            grid,
            task.initial_arrays(),
            num_rounds=rounds,
            callbacks=[CommitCallback(grid), counted],
        )
    said = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]
    for relay in relays:
        relay.close()
    each = (rounds - 1) * CLIENTS
    return {
        "method": method,
        "parameters": chosen.layout.size,
        "up_bytes": round((counted.up[-1] - counted.up[0]) / each),
        "down_bytes": round((counted.down[-1] - counted.down[0]) / each),
        "first_round_down_bytes": round(counted.down[0] / CLIENTS),
        "node_peak_mb": round(sum(one["peak_bytes"] for one in said) / nodes / 1e6, 1),
        "seconds_per_round": round((counted.ended[-1] - counted.ended[0]) / (rounds - 1), 3),
    }


class GoodEnough(Exception):  # noqa: N818 - not an error
    """Ends a run that need not go on."""


class Accuracy(Callback):
    """The test accuracy every few rounds, and the first round with one in the band, where a run may end."""

    def __init__(self, task: WideDigits, every: int, *, stop: bool) -> None:
        self._task, self._every, self._stop = task, every, stop
        self.values: list[float] = []
        self.reached: int | None = None

    def on_round_end(self, report: RoundReport) -> None:
        """Evaluate the model."""
        if report.server_round % self._every:
            return
        self.values.append(self._task.evaluate(report.arrays)["accuracy"])
        print(f"round {report.server_round}: {self.values[-1]:.3f}", file=sys.stderr, flush=True)
        if self.reached is None and self.values[-1] > BAND:
            self.reached = report.server_round
            if self._stop:
                raise GoodEnough


def quality(
    method: str, settings: dict[str, Any], rounds: int, seed: int, local_steps: int = 1, lr: float = 0.05
) -> dict[str, Any]:
    """Train the largest model in this process; return the rounds and the payload that 0.9 took."""
    task = WideDigits(WIDTHS[-1], seed=seed)
    chosen = strategy(method, settings, seed)
    fedavg = method == "fedavg"
    app = client_app(task, lr=lr, local_steps=local_steps, batch_size=BATCH)
    watch = Accuracy(task, 1 if fedavg else 10, stop=fedavg)
    grid = LocalGrid(app, CLIENTS, executor="serial")
    with suppress(GoodEnough):
        chosen.start(grid, task.initial_arrays(), num_rounds=rounds, callbacks=[watch])
    payload = 4 * chosen.layout.size if fedavg else 20 + 4 * settings["pairs"]
    return {
        "method": method,
        "local_steps": local_steps if fedavg else 0,
        "seed": seed,
        "parameters": chosen.layout.size,
        "rounds_to_0.9": watch.reached,
        "kb_up_to_0.9": None if watch.reached is None else round(watch.reached * payload / 1e3, 1),
        "accuracy": round(watch.values[-1], 3),
        "best": round(max(watch.values), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quality", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in TUNED.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="only EGGROLL, on the largest model")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in TUNED}
    if options.quality:
        rows = [quality("shared", settings, options.quality, options.seed)]
        if not options.quick:
            rows += [
                quality("fedavg", settings, options.quality, options.seed, *one) for one in FEDAVG.items()
            ]
    else:
        cases = [("shared", WIDTHS[-1])]
        if not options.quick:
            cases = [(method, widths) for widths in WIDTHS for method in ("shared", "disjoint", "fedavg")]
        rows = [federate(method, settings, widths, options.nodes, options.rounds) for method, widths in cases]
    result = {
        "benchmark": "eggroll",
        "clients": CLIENTS,
        "nodes": options.nodes,
        **settings,
        "payload_up": 20 + 4 * options.pairs,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
