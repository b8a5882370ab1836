"""Bytes of requests and replies with and without codes, and what the model learns: FRUGAL and ECO on digits.

    python benchmarks/coded_replies.py [--rounds 20]

Ten clients, twenty local steps a round, a perceptron of 64-256-256-10. Bytes are those of the arrays as they
are packed for gRPC, for one client and round, after the first round.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import nn

from turnout.client import client_app
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg, ServerECO, StreamingStrategy
from turnout.tasks import Digits
from turnout.wire import keys
from turnout.wire.flower import new_context
from turnout.wire.packing import pack

CLIENTS, STEPS = 10, 20


class Wide(Digits):
    """Digits with two hidden layers of 256."""

    def model(self) -> nn.Module:
        """Return the perceptron."""
        widths = (64, 256, 256, 10)
        layers: list[nn.Module] = [nn.Flatten()]
        for n, m in itertools.pairwise(widths):
            layers += [nn.Linear(n, m), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Case:
    """What clients do, and the server."""

    name: str
    client: dict[str, Any]
    server: type[StreamingStrategy] = FedAvg
    options: dict[str, Any] = field(default_factory=dict)


def frugal(reply: str, **options: Any) -> dict[str, Any]:
    """Return clients with FRUGAL, of one window a round."""
    return {
        "optimizer": "frugal",
        "lr": 1e-3,
        "reply": reply,
        "optimizer_options": {"update_gap": 20, **options},
    }


def eco(reply: str, quantizer: str) -> dict[str, Any]:
    """Return clients with ECO."""
    options = {"quantizer": quantizer}
    return {
        "optimizer": "eco-sgd",
        "lr": 0.3,
        "reply": reply,
        "optimizer_state": "keep",
        "optimizer_options": options,
    }


CASES = [
    Case("AdamW", {"optimizer": "adamw", "lr": 1e-3}),
    Case("FRUGAL, columns", frugal("dense", projector="columns")),
    Case("FRUGAL, columns, coded", frugal("coded", projector="columns")),
    Case("FRUGAL, randk, coded", frugal("coded", projector="randk")),
    Case("FRUGAL, density 0, coded", frugal("coded", projector="columns", density=0.0)),
    Case("SGD", {"optimizer": "sgd", "lr": 0.3}),
    Case("ECO int8", eco("dense", "int8")),
    Case("ECO int8, coded", eco("coded", "int8")),
    Case("ECO int4, coded", eco("coded", "int4")),
    Case("SGD, server ECO of 8 bits", {"optimizer": "sgd", "lr": 0.3}, ServerECO, {"momentum": 0.5}),
    Case("ECO int8, coded, server ECO of 8 bits", eco("coded", "int8"), ServerECO, {"momentum": 0.5}),
    Case(
        "ECO int4, coded, server ECO of 4 bits", eco("coded", "int4"), ServerECO, {"momentum": 0.5, "bits": 4}
    ),
]  # fmt: skip


def measured(case: Case, rounds: int) -> str:
    """Return the case's row."""
    task = Wide(num_clients=CLIENTS)
    app = client_app(task, local_steps=STEPS, batch_size=32, **case.client)
    strategy, grid = case.server(**case.options), LocalGrid(app, CLIENTS, executor="serial")
    result = strategy.start(grid, task.initial_arrays(), num_rounds=rounds)
    (asked, *_) = strategy.configure_train(rounds + 1, strategy.arrays(), ConfigRecord(), grid)
    answer = app(asked, new_context(node_id=0, node_config={"partition-id": 0}))
    down, up = (pack(content[keys.ARRAYS])[0].size for content in (asked.content, answer.content))
    accuracy = task.evaluate(result.arrays)["accuracy"]
    return f"| {case.name} | {down:,} | {up:,} | {accuracy:.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| clients, server | bytes down | bytes up | accuracy |")
    print("| --- | --- | --- | --- |")
    for case in CASES:
        print(measured(case, rounds), flush=True)


if __name__ == "__main__":
    main()
