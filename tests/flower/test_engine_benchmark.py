"""benchmarks/flower_engines.py works, and its table can be read by the documentation."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.flower
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_small_one_prints_the_ratios() -> None:
    command = [sys.executable, "benchmarks/flower_engines.py", "--without", "superlink", "--turns", "1"]
    settings = ["--parameters", "100", "--clients", "2", "--rounds", "1"]
    done = subprocess.run([*command, *settings], cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert set(result["engines"]) == {"ray-flower", "ray-stock", "ray-turnout", "fleet", "local"}
    for ratios in result["flower_over_turnout"].values():
        assert set(ratios) == {"round", "server_memory"}
        assert all(value > 0 for value in ratios.values())


def test_what_is_published_has_every_engine() -> None:
    path = REPOSITORY / "docs/results/flower-engines.jsonl"
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    engines = {name for run in runs for name in run["engines"]}
    assert engines >= {
        f"{engine}-{server}" for engine in ("superlink", "ray") for server in ("flower", "turnout")
    }
    assert {"fleet", "local"} <= engines
