"""What a round costs when few of many clients take part: every strategy, N = 100 to 100,000, 100 in a round.

    python benchmarks/round_cost.py [--rounds 30] [--only fedstale,fedau] [--clients 100,10000] [--profile]
    python benchmarks/round_cost.py --only scaffold,feddyn --clients 10000 --parameters 100000 --fill

Real rounds: a `LocalGrid` whose clients add a little noise to the model (so that the time is the system's,
not theirs) and keep vectors as the strategy's local update does, cohorts drawn by `Sampled`, a run store, and
a checkpoint after every round. Prints the median milliseconds of a round by strategy and N, and of the
largest N the first round, in which all are registered, and the last checkpoint, on standard error; then one
JSON line. ``--fill`` has every client take part once before, 100 in a round, without checkpoints: what
clients keep, and what strategies keep of them, is then there for all N. ``--profile`` prints where the time
goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.client.state import ClientState
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.store import RunStore
from turnout.simulation import LocalGrid, Sampled
from turnout.simulation.participation import Clients
from turnout.strategies import Callback, RoundReport
from turnout.wire import as_array, find, keys, view

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

# What clients keep between rounds, by local update.
KEPT = {
    "scaffold": ["control"],
    "dyn": ["regulariser"],
    "admm": ["primal", "reference"],
    "dual-admm": ["primal", "dual"],
}
NEVER = 1 << 30

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Reply with the model and a little noise."""
    client = int(context.node_config["partition-id"])
    config = message.content[keys.CONFIG]
    server_round, local_update = int(config[keys.SERVER_ROUND]), str(config[keys.LOCAL_UPDATE])
    received = view(message.content[keys.ARRAYS]["w"])
    noise = np.random.default_rng([client, server_round]).standard_normal(received.size)
    if local_update in KEPT:
        state = ClientState(context.state, local_update, server_round)
        kept = state.load(received.size)
        moved = noise.astype(np.float32)
        state.save({name: kept.get(name, received) + moved for name in KEPT[local_update]})
    content = RecordDict()
    content[keys.METRICS] = MetricRecord({"num-examples": 1 + client % 7, "client-id": client})
    if local_update == "anchor":
        content[keys.GRADIENT] = ArrayRecord({"w": as_array(noise.astype(np.float32))})
    else:
        content[keys.ARRAYS] = ArrayRecord({"w": as_array((received + 0.01 * noise).astype(np.float32))})
    if local_update == "scaffold":
        content[keys.CONTROL] = ArrayRecord({"w": as_array(noise.astype(np.float32))})
    return Message(content, reply_to=message)


class EveryoneFirst(Sampled):
    """All clients once, as many in a round as later, in the first ``filling`` rounds."""

    filling = 0

    def _present(self, server_round: int) -> Clients:
        if server_round > self.filling:
            return super()._present(server_round)
        first = (server_round - 1) * self.clients_per_round
        return np.arange(first, min(first + self.clients_per_round, self.num_clients))


class Clock(Callback):
    """The seconds from the end of one round to that of the next, and of each checkpoint."""

    def __init__(self, recorder: RunRecorder, filling: int) -> None:
        self.rounds: list[float] = []
        self.checkpoints: list[float] = []
        self._recorder, self._filling = recorder, filling
        self._since = time.perf_counter()

    def on_round_end(self, report: RoundReport) -> None:
        now = time.perf_counter()
        self.rounds.append(now - self._since)
        self._since = now
        if report.server_round == self._filling:
            self._recorder.checkpoint_every = 1
        written = self._recorder.last_checkpoint
        if written is not None and written.server_round == report.server_round:
            self.checkpoints.append(written.seconds)


def measure(name: str, clients: int, options: argparse.Namespace) -> dict[str, float]:
    """Run one strategy and return its figures."""
    slug = name.split()[0]
    participation = EveryoneFirst(clients, COHORT, seed=1)
    participation.filling = filling = -(-clients // COHORT) if options.fill else 0
    rounds = filling + options.rounds
    settings = dict(STRATEGIES[name])
    if settings.get("participation") == "known":
        settings["participation"] = participation.rates
    strategy = find("strategy", slug).target(**settings)
    grid = LocalGrid(app, clients, participation=participation)
    start = ArrayRecord({"w": as_array(np.zeros(options.parameters, np.float32))})
    description = RunDescription(
        name="cost", strategy=slug, task="noise", seed=0, num_rounds=rounds, num_clients=clients, config={}
    )
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder, RunStore(folder) as store:
        recorder = RunRecorder.create(
            store, Path(folder) / "runs", description, checkpoint_every=NEVER if filling else 1
        )
        with recorder:
            clock = Clock(recorder, filling)
            if options.profile:
                profiler.enable()
            strategy.start(grid, start, num_rounds=rounds, callbacks=[recorder, clock])
            profiler.disable()
        written = recorder.last_checkpoint
        assert written is not None
        on_disk = sum(file.stat().st_size for file in written_files(recorder))
    if options.profile:
        print(f"--- {name}, N = {clients}", file=sys.stderr)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(14)
    # The first checkpoint has the rows of all who have taken part; those that follow, of one round.
    steady = clock.checkpoints[1:]
    return {
        "ms": 1e3 * float(np.median(clock.rounds[filling + 1 :])),
        "first_ms": 1e3 * clock.rounds[0],
        "checkpoint_ms": 1e3 * float(np.median(steady)),
        "first_checkpoint_ms": 1e3 * clock.checkpoints[0],
        "checkpoint_kb": written.bytes / 1e3,
        "on_disk_mb": on_disk / 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def written_files(recorder: RunRecorder) -> list[Path]:
    """Return the checkpoints kept and the rows beside them."""
    return list((recorder.directory.path / "checkpoints").iterdir())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", default="100,10000,100000")
    parser.add_argument("--only", default=",".join(STRATEGIES))
    parser.add_argument("--parameters", type=int, default=650)
    parser.add_argument("--fill", action="store_true", help="every client takes part once before")
    parser.add_argument("--directory", type=Path, help="where runs are recorded (default: temporary files)")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    sizes = [int(size) for size in options.clients.split(",")]
    figures: dict[str, dict[int, dict[str, float]]] = {}
    heading = "".join(f"{f'N = {size:,}':>14}" for size in sizes)
    print(f"{'ms a round':16}{heading}   first          checkpoint     on disk", file=sys.stderr)
    for name in options.only.split(","):
        results = {size: measure(name, size, options) for size in sizes}
        figures[name] = results
        last = results[sizes[-1]]
        columns = "".join(f"{results[size]['ms']:14.1f}" for size in sizes)
        checkpoint = f"{last['checkpoint_ms']:8.1f} ms{last['checkpoint_kb']:8.0f} kB"
        disk = f"{last['on_disk_mb']:9.1f} MB"
        print(f"{name:16}{columns}{last['first_ms']:8.0f}{checkpoint}{disk}", file=sys.stderr)
    about = {"cohort": COHORT, "parameters": options.parameters, "filled": options.fill}
    print(json.dumps({"benchmark": "round-cost", **about, "figures": figures}))


if __name__ == "__main__":
    main()
