"""What a round costs when few of many clients take part: every strategy, N = 100 to 100,000, 100 in a round.

    python benchmarks/round_cost.py [--rounds 30] [--only fedstale,fedau] [--clients 100,10000] [--profile]

Real rounds: a `LocalGrid` whose clients add a little noise to the model (so that the time is the system's,
not theirs), cohorts drawn by `Sampled`, a run store, and a checkpoint after every round. Prints the median
milliseconds of a round by strategy and N, and of the largest N the first round, in which all are registered,
and the last checkpoint, on standard error; then one JSON line. ``--profile`` prints where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.store import RunStore
from turnout.simulation import LocalGrid, Sampled
from turnout.strategies import Callback, RoundReport
from turnout.wire import as_array, find, keys, view

PARAMETERS = 650
COHORT = 100
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {},
    "average-all": {},
    "unbiased-fedavg": {"participation": "known"},
    "fedau": {},
    "fedvarp": {},
    "mifa": {},
    "fedstale": {},
    "fedstale mmap": {"memory": "mmap"},
    "fedstale fp16": {"memory": "fp16"},
    "fedamd": {"cold_start": False},
    "rerce-fed": {"clients_per_round": COHORT},
    "dual-admm": {"clients_per_round": COHORT},
    "scaffold": {},
    "feddyn": {},
}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Reply with the model and a little noise."""
    client = int(context.node_config["partition-id"])
    config = message.content[keys.CONFIG]
    noise = np.random.default_rng([client, int(config[keys.SERVER_ROUND])]).standard_normal(PARAMETERS)
    received = view(message.content[keys.ARRAYS]["w"])
    content = RecordDict()
    content[keys.METRICS] = MetricRecord({"num-examples": 1 + client % 7, "client-id": client})
    if config[keys.LOCAL_UPDATE] == "anchor":
        content[keys.GRADIENT] = ArrayRecord({"w": as_array(noise.astype(np.float32))})
    else:
        content[keys.ARRAYS] = ArrayRecord({"w": as_array((received + 0.01 * noise).astype(np.float32))})
    if config[keys.LOCAL_UPDATE] == "scaffold":
        content[keys.CONTROL] = ArrayRecord({"w": as_array(noise.astype(np.float32))})
    return Message(content, reply_to=message)


class Clock(Callback):
    """The seconds from the end of one round to that of the next."""

    def __init__(self) -> None:
        self.rounds: list[float] = []
        self._since = time.perf_counter()

    def on_round_end(self, report: RoundReport) -> None:
        now = time.perf_counter()
        self.rounds.append(now - self._since)
        self._since = now


def measure(name: str, clients: int, rounds: int, *, profile: bool) -> dict[str, float]:
    """Run one strategy and return its figures."""
    slug = name.split()[0]
    participation = Sampled(clients, COHORT, seed=1)
    options = dict(STRATEGIES[name])
    if options.get("participation") == "known":
        options["participation"] = participation.rates
    strategy = find("strategy", slug).target(**options)
    grid = LocalGrid(app, clients, participation=participation)
    start = ArrayRecord({"w": as_array(np.zeros(PARAMETERS, np.float32))})
    description = RunDescription(
        name="cost", strategy=slug, task="noise", seed=0, num_rounds=rounds, num_clients=clients, config={}
    )
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder, RunStore(folder) as store:
        recorder = RunRecorder.create(store, Path(folder) / "runs", description)
        with recorder:
            clock = Clock()
            if profile:
                profiler.enable()
            strategy.start(grid, start, num_rounds=rounds, callbacks=[recorder, clock])
            profiler.disable()
        written = recorder.last_checkpoint
        assert written is not None
    if profile:
        print(f"--- {name}, N = {clients}", file=sys.stderr)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(14)
    return {
        "ms": 1e3 * float(np.median(clock.rounds[1:])),
        "first_ms": 1e3 * clock.rounds[0],
        "checkpoint_ms": 1e3 * written.seconds,
        "checkpoint_kb": written.bytes / 1e3,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", default="100,10000,100000")
    parser.add_argument("--only", default=",".join(STRATEGIES))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    sizes = [int(size) for size in options.clients.split(",")]
    figures: dict[str, dict[int, dict[str, float]]] = {}
    heading = "".join(f"{f'N = {size:,}':>14}" for size in sizes)
    print(f"{'ms a round':16}{heading}   first  checkpoint", file=sys.stderr)
    for name in options.only.split(","):
        results = {size: measure(name, size, options.rounds, profile=options.profile) for size in sizes}
        figures[name] = results
        last = results[sizes[-1]]
        columns = "".join(f"{results[size]['ms']:14.1f}" for size in sizes)
        print(f"{name:16}{columns}{last['first_ms']:8.0f}{last['checkpoint_kb']:8.0f} kB", file=sys.stderr)
    print(json.dumps({"benchmark": "round-cost", "cohort": COHORT, "figures": figures}))


if __name__ == "__main__":
    main()
