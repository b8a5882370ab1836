"""The same round on every engine: seconds, and the peak memory of the server's process, in pairs.

    python benchmarks/flower_engines.py [--parameters 1000 5000000] [--clients 4] [--turns 2]

Clients return the model they received (benchmarks/superlink_app), so a round is what the engine takes. On
Flower's SuperLink and Ray simulation, three servers take turns: Flower's FedAvg on Flower's own grid
(``flower``), the same FedAvg on Turnout's `FlowerGrid` (``stock``), and Turnout's FedAvg on it (``turnout``).
Beside them, the gRPC fleet and one process. Flower has its best settings: state in memory, no TLS, no runtime
installation, one core per Ray client, its simulation's pull interval at 0.01 s instead of 0.1. The 3 s
between two looks for replies on SuperLink are fixed in Flower, and so is that SuperNodes start a process per
message outside Kubernetes.

Prints one JSON line per number of parameters: seconds of a round (median of a run, least of the turns), peak
memory of the server's process in MB of 1e6 bytes, and the ratios of Flower to Turnout. Its part with Ray
needs ray, which `make test-flower` installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from fleet_parties import Party, Turns, children, memory_mb
from fleet_superlink import APP, node
from flower_superlink import SuperLink, federation

SERVERS = ("flower", "stock", "turnout")


def on_flower(link: SuperLink, server: str, options: argparse.Namespace, parameters: int) -> dict[str, Any]:
    """Run the app on a running SuperLink; return the median second of a round and the memory."""
    result = link.home / "result.json"
    result.unlink(missing_ok=True)
    config = {
        "engine": server,
        "rounds": options.rounds,
        "clients": options.clients,
        "parameters": parameters,
        "result": str(result),
    }
    said = link.run(APP, config, timeout=900)
    if not result.exists():
        raise RuntimeError(f"{server}: {said[-3000:]}{link.logs()}")
    found: dict[str, Any] = json.loads(result.read_text())
    return figures(found["seconds"], found["server_peak_mb"])


def figures(seconds: list[float], peak_mb: float) -> dict[str, Any]:
    return {"round_s": statistics.median(seconds), "server_mb": peak_mb}


def on_fleet(turns: Turns, clients: int, rounds: int, parameters: int) -> None:
    """The gRPC fleet, in a process of its own."""
    from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
    from turnout.strategies import FedAvg

    with (
        FleetServer(num_clients=clients) as server,
        children([(node, (server.address, client)) for client in range(clients)]),
    ):
        grid = FleetGrid(server, min_clients=clients, wait=60)
        grid.get_node_ids()
        turns.ready()
        while turns.wait():
            clock = _clock()
            FedAvg(num_clients=clients).start(
                grid, _model(parameters), num_rounds=rounds, callbacks=[CommitCallback(grid), clock]
            )
            turns.answer(**figures(clock.seconds, memory_mb("VmHWM")))
        server.stop(grace=1)


def in_one_process(turns: Turns, clients: int, rounds: int, parameters: int) -> None:
    """`LocalGrid`, in a process of its own."""
    sys.path.insert(0, str(APP))
    from superlink_app.client_app import app

    from turnout.simulation import LocalGrid
    from turnout.strategies import FedAvg

    turns.ready()
    while turns.wait():
        clock = _clock()
        grid = LocalGrid(app, clients)
        FedAvg(num_clients=clients).start(grid, _model(parameters), num_rounds=rounds, callbacks=[clock])
        turns.answer(**figures(clock.seconds, memory_mb("VmHWM")))


def _model(parameters: int) -> ArrayRecord:
    import numpy as np

    return ArrayRecord([np.zeros(parameters, np.float32)])


def _clock() -> Any:
    from turnout.strategies import Callback, RoundReport

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_round_end(self, report: RoundReport) -> None:
            if any(client.outcome != "ok" for client in report.clients):
                raise RuntimeError(f"round {report.server_round}: {report.clients}")
            self.seconds.append(sum(report.seconds[name] for name in ("select", "train", "finish")))

    return Clock()


def best(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Return the quietest of the turns: the least of each figure."""
    return {name: min(float(sample[name]) for sample in samples) for name in ("round_s", "server_mb")}


def measure(options: argparse.Namespace, parameters: int) -> dict[str, Any]:
    """Return the figures of every engine, and Flower's over Turnout's."""
    taken: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="flower-engines-") as home:
        engines: dict[str, Any] = {
            "superlink": lambda: federation(Path(home) / "link", range(options.clients))
        }
        if importlib.util.find_spec("ray") is not None:
            engines["ray"] = lambda: SuperLink(Path(home) / "ray", simulation_nodes=options.clients)
        for name, start in engines.items():
            if name in options.without:
                continue
            with start() as link:
                for _ in range(options.turns):
                    for server in SERVERS:
                        sample = on_flower(link, server, options, parameters)
                        taken.setdefault(f"{name}-{server}", []).append(sample)
                        print(parameters, name, server, sample, file=sys.stderr, flush=True)
    for name, target in (("fleet", on_fleet), ("local", in_one_process)):
        with Party(target, options.clients, 10 * options.rounds, parameters) as party:
            party.ready()
            taken[name] = [dict(party.round(what="go")) for _ in range(options.turns)]
            print(parameters, name, taken[name], file=sys.stderr, flush=True)
    figure = {name: best(samples) for name, samples in taken.items()}
    ratios = {}
    for engine in ("superlink", "ray"):
        if f"{engine}-flower" not in figure:
            continue
        theirs = figure[f"{engine}-flower"]
        for server in ("stock", "turnout"):
            ours = figure[f"{engine}-{server}"]
            ratios[f"{engine}-{server}"] = {
                "round": round(theirs["round_s"] / ours["round_s"], 2),
                "server_memory": round(theirs["server_mb"] / ours["server_mb"], 2),
            }
    rounded = {n: {k: float(f"{v:.4g}") for k, v in values.items()} for n, values in figure.items()}
    return {"benchmark": "flower-engines", "parameters": parameters, "clients": options.clients,
            "engines": rounded, "flower_over_turnout": ratios}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[1000, 5_000_000])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="rounds on Flower's engines (default 3)")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], choices=["superlink", "ray"])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the SuperLinks end with it.
    for parameters in options.parameters:
        print(json.dumps(measure(options, parameters)), flush=True)


if __name__ == "__main__":
    main()
