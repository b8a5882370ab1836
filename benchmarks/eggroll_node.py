"""A node of EGGROLL's benchmark: digits clients with a perceptron of any width, and what memory they took.

    python benchmarks/eggroll_node.py HOST:PORT CLIENTS NAME WIDTHS

Prints one JSON line when the server is done: ``peak_bytes`` beyond what the process took before it connected.
"""

from __future__ import annotations

import json
import resource
import sys
from itertools import pairwise

import torch
from torch import nn

from turnout.client import client_app
from turnout.client.node import parse_clients, run_node
from turnout.tasks import Digits

BATCH = 16


class WideDigits(Digits):
    """The digits with a perceptron of the given hidden ``widths``."""

    def __init__(self, widths: tuple[int, ...], *, num_clients: int = 10, alpha: float = 0.1, seed: int = 0):
        self.widths = widths
        super().__init__(num_clients=num_clients, alpha=alpha, seed=seed)

    def model(self) -> nn.Module:
        """Return a new perceptron."""
        sizes = (self.side**2, *self.widths, self.classes)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Work for the server until it is done."""
    address, clients, name, widths = sys.argv[1:5]
    torch.set_num_threads(1)
    task = WideDigits(tuple(int(width) for width in widths.split("-")))
    app = client_app(task, lr=0.05, local_steps=1, batch_size=BATCH)
    before = peak()
    run_node(address, app, parse_clients(clients), name=name)
    print(json.dumps({"peak_bytes": peak() - before}))


if __name__ == "__main__":
    main()
