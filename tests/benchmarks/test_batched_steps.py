"""The benchmark of the batched trainer runs; how fast is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "batched_steps.py"


def test_each_workload_prints_its_rates():
    command = [sys.executable, str(BENCHMARK), "--seconds", "0", "--only", "softmax", "cnn"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    softmax, cnn = (json.loads(line) for line in done.stdout.splitlines())
    assert softmax["workload"] == "softmax"
    assert set(softmax["client_updates_per_s"]) == {"tight", "serial", "batched"}
    assert set(cnn["client_updates_per_s"]) == {"tight", "tight-nhwc", "serial", "batched"}
    assert all(rate > 0 for rate in cnn["client_updates_per_s"].values())
    assert softmax["batched/tight"] > 1
