"""Rounds of the same app on Flower's SuperLink and SuperNodes (over HTTP) and on the fleet, in one run.

    python benchmarks/fleet_superlink.py [--rounds 5] [--quick]

Prints one JSON line: the seconds of a round on each, and their ratio. Both sides run
benchmarks/superlink_app, whose clients return the model they received, with a server process and two node
processes on loopback, without TLS. SuperLink keeps its state in memory and starts the app's processes itself
(``--isolation subprocess``, its default), without installing dependencies and without telemetry. The fleet
runs the app's own ServerApp code, with Flower's FedAvg, and Turnout's FedAvg beside it; it is measured before
and after SuperLink.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from fleet_parties import Party, Sample, Turns, children, memory_mb, rounded
from fleet_turnout import WAIT_SECONDS
from turnout.client.node import run_node
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.strategies import Callback, FedAvg
from turnout.wire import as_array

APP = Path(__file__).parent / "superlink_app"
CLIENTS = 2
START_SECONDS = 60.0
ROUND_SECONDS = 60.0  # SuperLink's are about a tenth of it.


# The fleet.


def node(address: str, client: int) -> None:
    sys.path.insert(0, str(APP))
    from superlink_app.client_app import app

    run_node(address, app, [client], name=f"n{client}")


class Clock(Callback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_round_end(self, report: Any) -> None:
        if any(row.outcome != "ok" for row in report.clients):
            raise RuntimeError(f"round {report.server_round}: {report.clients}")
        self.times.append(time.perf_counter())


def fleet(turns: Turns, rounds: int, parameters: int) -> None:
    """``stock`` runs Flower's FedAvg, ``own`` Turnout's; each answers with the rounds' median seconds."""
    sys.path.insert(0, str(APP))
    from superlink_app.server_app import run

    logging.getLogger("flwr").setLevel("ERROR")
    with (
        FleetServer(num_clients=CLIENTS) as server,
        children([(node, (server.address, client)) for client in range(CLIENTS)]),
    ):
        FleetGrid(server, min_clients=CLIENTS, wait=WAIT_SECONDS).get_node_ids()
        turns.ready()
        while asked := turns.wait():
            grid = FleetGrid(server, min_clients=CLIENTS, wait=WAIT_SECONDS)
            if asked == "stock":
                seconds = run(grid, clients=CLIENTS, rounds=rounds, parameters=parameters)
            else:
                seconds = _own(grid, rounds, parameters)
            turns.answer(
                seconds=statistics.median(seconds),
                p99=float(np.quantile(seconds, 0.99)),
                server_peak_mb=memory_mb("VmHWM"),
            )
        server.stop(grace=1)


def _own(grid: FleetGrid, rounds: int, parameters: int) -> list[float]:
    arrays, clock = ArrayRecord(), Clock()
    arrays["0"] = as_array(np.zeros(parameters, np.float32))
    FedAvg(num_clients=CLIENTS).start(
        grid, arrays, num_rounds=rounds, timeout=WAIT_SECONDS, callbacks=[CommitCallback(grid), clock]
    )
    return list(np.diff(clock.times))


# SuperLink.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run a Flower command with a session of its own, so that its subprocesses end with it."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def reachable(port: int) -> None:
    """Wait until something listens on ``port``."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port} after {START_SECONDS:g} seconds.")


def superlink(home: Path, rounds: int, parameters: int) -> dict[str, Any]:
    """Return the seconds of SuperLink's rounds and the peak memory of its ServerApp."""
    commands = Path(sys.executable).parent
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
    }
    port, result = free_port(), home / "result.json"
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{address}"\ninsecure = true\n'
    )
    config = f'rounds={rounds} clients={CLIENTS} parameters={parameters} result="{result}"'
    link = [str(commands / "flower-superlink"), "--insecure", "--isolation", "subprocess", "--host",
            "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(link, environment, home / "superlink.log"))
            reachable(port)
            for client in range(CLIENTS):
                supernode = [str(commands / "flower-supernode"), "--insecure", "--superlink", address,
                             "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(free_port()),
                             "--node-config", f"partition-id={client} num-partitions={CLIENTS}"]  # fmt: skip
                stack.enter_context(running(supernode, environment, home / f"supernode-{client}.log"))
            submit = [str(commands / "flwr"), "run", str(APP), "bench", "--run-config", config]
            done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise RuntimeError(f"flwr run failed: {done.stdout}{done.stderr}")
            deadline = time.monotonic() + 2 * START_SECONDS + rounds * ROUND_SECONDS
            while not result.exists() or not result.stat().st_size:
                if time.monotonic() > deadline:
                    raise RuntimeError("the SuperLink run did not end in time.")
                time.sleep(0.2)
    except RuntimeError:
        for log in sorted(home.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
        raise
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds on SuperLink (default 5)")
    parser.add_argument("--fleet-rounds", type=int, default=300, help="rounds on the fleet (default 300)")
    parser.add_argument("--parameters", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="one SuperLink round, 30 of the fleet")
    parser.add_argument("--fleet-only", action="store_true", help="leave SuperLink out: no ratio then")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.fleet_rounds = 1, 30
    stock: list[Sample] = []
    own: list[Sample] = []
    link: dict[str, Any] = {}
    with Party(fleet, options.fleet_rounds, options.parameters) as party:
        party.ready()

        def ask() -> None:
            stock.append(party.round(what="stock"))
            own.append(party.round(what="own"))
            print(rounded(stock[-1]), rounded(own[-1]), file=sys.stderr)

        ask()
        if not options.fleet_only:
            with tempfile.TemporaryDirectory(prefix="fleet-superlink-") as home:
                link = superlink(Path(home), options.rounds, options.parameters)
            print(link, file=sys.stderr)
            ask()
    result: dict[str, Any] = {
        "benchmark": "fleet-superlink",
        "parameters": options.parameters,
        "nodes": CLIENTS,
        "turnout_round_ms": 1e3 * statistics.median(row["seconds"] for row in own),
        "turnout_round_p99_ms": 1e3 * max(row["p99"] for row in own),
        "turnout_with_flowers_fedavg_round_ms": 1e3 * statistics.median(row["seconds"] for row in stock),
        "turnout_server_peak_mb": max(row["server_peak_mb"] for row in own),
    }
    if link:
        seconds = statistics.median(link["seconds"])
        result |= {
            "superlink_round_s": seconds,
            "superlink_rounds_s": [round(value, 3) for value in link["seconds"]],
            "superlink_serverapp_peak_mb": link["server_peak_mb"],
            "ratio": seconds * 1e3 / result["turnout_round_ms"],
            "ratio_with_flowers_fedavg": seconds * 1e3 / result["turnout_with_flowers_fedavg_round_ms"],
            "target": ">= 500",
            "ambitious": 1000,
        }
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
