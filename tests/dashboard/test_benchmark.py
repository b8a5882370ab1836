"""The benchmark runs, on a store that is small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_prints_every_request(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "dashboard_api.py", "--store", tmp_path, "--rounds", "60",
         "--repeats", "2", "--small-runs", "5"],
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith(("runs", "compare", "diff")) for line in lines) == 20
    assert json.loads(lines[-1])["opened_seconds"] > 0
