"""The example files of the docs run as they are."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pages import REPOSITORY

from turnout.experiment import load_experiment

FILES = sorted(path for path in (REPOSITORY / "examples").rglob("*.toml") if path.name != "pyproject.toml")


def test_the_own_task_example_learns() -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / "own_task.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    accuracies = {name: float(value) for name, value in re.findall(r"(\w+) +accuracy ([\d.]+)", done.stdout)}
    assert set(accuracies) == {"FedAvg", "FedAU"}
    assert min(accuracies.values()) > 0.6, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_valid(path) -> None:
    experiment = load_experiment(path)
    for name in experiment.strategies:
        experiment.variant(name)
