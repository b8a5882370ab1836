"""How fast replies are folded, and how much memory a round takes, against NumPy's own addition.

    python benchmarks/fold.py [--parameters 10000000] [--replies 100]

Real messages go through a real strategy (`aggregate_train`), one reply alive at a time. Each strategy runs
in a process of its own so that peak memory is its own. The limits are measured in the same run, before and
after, on vectors of the same size: ``np.add`` of float32 into the float64 accumulator that an
order-independent sum needs, and ``np.add`` of float32 into float32, which is what a sum without that
promise would cost. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from turnout.strategies import FedAU, FedAvg, FedStale, StreamingStrategy
from turnout.strategies.exact_sum import ExactSum
from turnout.wire import ParameterLayout, as_array
from turnout.wire.flower import Run, local_run, reply

STRATEGIES = {
    "fedavg": lambda: FedAvg(),
    "fedau": lambda: FedAU(),
    "fedstale-mmap": lambda: FedStale(memory="mmap"),
}


class ReplayGrid(Grid):
    """Names ``count`` nodes; replies are made by the benchmark, not here."""

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def run(self) -> Run:
        return local_run()

    def set_run(self, run: Run) -> None:
        raise RuntimeError("this grid has no runs")

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise RuntimeError("this grid creates no messages")

    push_messages = pull_messages = send_and_receive = create_message  # type: ignore[assignment]

    def get_node_ids(self) -> range:
        return range(self.count)


def best_of(action: object, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()  # type: ignore[operator]
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def limits(size: int) -> dict[str, float]:
    """GB/s of float32 input that NumPy's addition alone reaches, and the exact sum without messages."""
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    a32, a64, total = np.zeros(size, np.float32), np.zeros(size), ExactSum(x)
    gigabytes = x.nbytes / 1e9
    return {
        "np_add_f32": gigabytes / best_of(lambda: np.add(a32, x, out=a32)),
        "np_add_f64": gigabytes / best_of(lambda: np.add(a64, x, out=a64)),
        "exact_sum": gigabytes / best_of(lambda: total.add(x, 0.37, largest=6.0)),
    }


def one(name: str, size: int, count: int) -> dict[str, float]:
    """Fold ``count`` replies of ``size`` parameters with one strategy; seconds exclude making the replies."""
    strategy: StreamingStrategy = STRATEGIES[name]()
    rng = np.random.default_rng(1)
    shapes = [(size // 2,), (size // 4,), (size - size // 2 - size // 4,)]
    initial = ArrayRecord(
        {f"w{i}": as_array(rng.standard_normal(s, np.float32)) for i, s in enumerate(shapes)}
    )
    layout = ParameterLayout.from_arrays(initial)
    vector = layout.flatten(initial)
    config = ConfigRecord()
    making = 0.0

    def replies(messages: list[Message]) -> Iterator[Message]:
        nonlocal making
        for i, message in enumerate(messages):
            started = time.perf_counter()
            trained = vector * np.float32(1 + (i + 1) * 1e-3)
            metrics = MetricRecord({"num-examples": 10 + i, "client-id": i})
            content = RecordDict({"arrays": layout.record(trained), "metrics": metrics})
            answer = reply(content, to=message)
            making += time.perf_counter() - started
            yield answer

    rss_one, seconds = 0, 0.0
    for server_round, cohort in ((1, 1), (2, count)):  # The first round warms up and shows the memory of one.
        making = 0.0
        messages = list(strategy.configure_train(server_round, initial, config, ReplayGrid(count)))[:cohort]
        started = time.perf_counter()
        strategy.aggregate_train(server_round, replies(messages))
        seconds = time.perf_counter() - started - making
        if server_round == 1:
            rss_one = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    megabytes = size * 4 / 1e6
    return {
        "gb_per_s": count * size * 4 / 1e9 / seconds,
        "peak_rss_mb": peak / 1e3,
        "growth_from_1_to_all_in_replies": (peak - rss_one) * 1024 / 1e6 / megabytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--replies", type=int, default=100)
    parser.add_argument("--only", choices=sorted(STRATEGIES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(one(options.only, options.parameters, options.replies)))
        return
    before = limits(options.parameters)
    results = {}
    for name in STRATEGIES:
        arguments = [
            "--parameters",
            str(options.parameters),
            "--replies",
            str(options.replies),
            "--only",
            name,
        ]
        done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE)
        results[name] = json.loads(done.stdout)
    after = limits(options.parameters)
    limit = {name: (before[name] + after[name]) / 2 for name in before}
    for figures in results.values():
        figures["ratio_to_np_add_f64"] = figures["gb_per_s"] / limit["np_add_f64"]
        figures["ratio_to_np_add_f32"] = figures["gb_per_s"] / limit["np_add_f32"]
    print(
        json.dumps({"parameters": options.parameters, "replies": options.replies, "limits": limit, **results})
    )


if __name__ == "__main__":
    main()
