"""How fast the dashboard answers over a large store: a real server on loopback, one request at a time.

The store has a run of 5,000 rounds and 1,000 clients of which a fifth takes part (a million client rounds and
a million metrics), and a hundred small runs. "first" is the first request of its kind after a start, when
nothing is remembered; p50 and p95 are over the requests after it.

    python benchmarks/dashboard_api.py            # makes the store in a temporary folder, half a gigabyte
    python benchmarks/dashboard_api.py --store DIR --repeats 50
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from dashboard_store import Shape, fill
from turnout.dashboard import Dashboard, DashboardOptions

BIG = Shape(rounds=5_000, clients=1_000, participation=0.2, series=200)
SMALL_RUNS = 100
# What the list and the run page ask for when they open, then the rest.
LIST = ("runs?limit=50",)
PAGE = (
    "runs/{run}",
    "runs/{run}/series?name=evaluate/accuracy&name=evaluate/loss&name=train/train-loss&name=round/participants",
    "runs/{run}/rounds?order=desc&limit=50",
    "runs/{run}/participation?rows=500&columns=1000",
    "runs/{run}/participation/layout?rows=500&columns=1000",
    "runs/{run}/clients?limit=50",
    "runs/{run}/attention",
    "runs/{run}/events",
)
REST = (
    "runs?q=bench-3&sort=metric",
    "runs?sort=rounds&limit=100",
    "runs/{run}/rounds?limit=100&metrics=true",
    "runs/{run}/series?name=diagnostics/diagnostic-000&points=20000",
    "runs/{run}/participation?rounds=4001:5000",
    "runs/{run}/clients?sort=train-loss&order=desc&limit=50",
    "runs/{run}/clients/17",
    "runs/{run}/clients/17/rounds?limit=100",
    "runs/{run}/fairness",
    "compare?run={run}&run=a0000001&run=a0000002&x=seconds",
    "diff?left={run}&right=a0000001",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="where the store is, or is made; kept")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=BIG.rounds)
    parser.add_argument("--small-runs", type=int, default=SMALL_RUNS)
    arguments = parser.parse_args()
    shape = Shape(arguments.rounds, BIG.clients, BIG.participation, BIG.series)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.store or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "turnout.sqlite").exists():
            began = time.perf_counter()
            fill(folder, shape, arguments.small_runs)
            print(f"made the store in {time.perf_counter() - began:.1f} s")
        size = (folder / "turnout.sqlite").stat().st_size
        of = f"{shape.rounds} rounds x {shape.clients} clients, {shape.series} series"
        print(f"store: {size / 1e6:.0f} MB, {of}")
        measure(folder, arguments.repeats)


def measure(folder: Path, repeats: int) -> None:
    options = DashboardOptions(port=0)
    with Dashboard(folder, options, catalogue=list) as served:
        print(f"{'':<74} {'first':>8} {'p50':>8} {'p95':>8} {'bytes':>9} {'gzip':>8}")
        opened = 0.0
        for group in (LIST, PAGE, REST):
            for path in group:
                url = f"{served.url}api/v1/{path.format(run='b1900001')}"
                first, size = _get(url)
                opened += first if group is not REST else 0.0
                times = [_get(url)[0] for _ in range(repeats)]
                zipped = _get(url, zipped=True)[1]
                p50, p95 = np.percentile(times, [50, 95])
                shown = path.replace("{run}", "RUN")[:74]
                print(
                    f"{shown:<74} {first * 1e3:>5.0f} ms {p50 * 1e3:>5.1f} ms {p95 * 1e3:>5.1f} ms {size:>9,}"
                    f" {zipped:>8,}"
                )
        print(f"list and run page, every request for the first time, one after the other: {opened:.2f} s")
        print(json.dumps({"opened_seconds": round(opened, 3)}))


def _get(url: str, *, zipped: bool = False) -> tuple[float, int]:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip" if zipped else "identity"})
    began = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        body = answer.read()
    return time.perf_counter() - began, len(body)


if __name__ == "__main__":
    main()
