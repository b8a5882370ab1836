"""Seconds of an EGGROLL client's round: members evaluated many at a time, and written one by one.

    python benchmarks/eggroll_members.py [--rounds 4] [--batch 16]

Ten clients in this process, on one thread each, for three widths of a perceptron on the digits and two
numbers of pairs. A figure is the median over clients and rounds from the second on; replaying the last round,
which the clients of a process share, falls to one of them. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

from torch import nn

from eggroll_node import WideDigits
from turnout.client import client_app
from turnout.simulation import LocalGrid
from turnout.strategies import EGGROLL, Callback, RoundReport

CLIENTS = 10
WIDTHS = ((32,), (320, 256), (1000, 950))
PAIRS = (20, 100)


class Nested(WideDigits):
    """The same perceptron inside another sequence, which is evaluated one member at a time."""

    def model(self) -> nn.Module:
        """Return a new perceptron."""
        return nn.Sequential(super().model(), nn.Identity())


class Seconds(Callback):
    """What clients took."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_round_end(self, report: RoundReport) -> None:
        """Note the seconds; a round in which a reply did not count is no measurement."""
        assert all(client.outcome == "ok" for client in report.clients), report.clients
        if report.server_round > 1:
            self.taken += [client.train_seconds for client in report.clients]


def milliseconds(task: WideDigits, pairs: int, batch: int, rounds: int) -> float:
    """Return the median milliseconds of a client's round."""
    seconds = Seconds()
    grid = LocalGrid(client_app(task, batch_size=batch), CLIENTS, executor="serial")
    strategy = EGGROLL(num_clients=CLIENTS, pairs=pairs, sigma=0.001, server_lr=0.001)
    strategy.start(grid, task.initial_arrays(), num_rounds=rounds, callbacks=[seconds])
    return round(1e3 * median(seconds.taken), 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for widths in WIDTHS:
        for pairs in PAIRS:
            one, many = (
                milliseconds(kind(widths), pairs, options.batch, options.rounds)
                for kind in (Nested, WideDigits)
            )
            rows.append(
                {
                    "widths": widths,
                    "pairs": pairs,
                    "one_by_one_ms": one,
                    "many_ms": many,
                    "times": round(one / many, 1),
                }
            )
    print(json.dumps({"benchmark": "eggroll_members", "batch": options.batch, "rows": rows}))


if __name__ == "__main__":
    main()
