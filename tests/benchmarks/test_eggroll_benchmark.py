"""Ten clients of a model of a million parameters send less than 1 kB a round, counted on the wire."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_reply_is_below_a_kilobyte_on_the_wire() -> None:
    command = [sys.executable, str(BENCHMARKS / "eggroll.py"), "--quick", "--nodes", "2", "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    assert row["parameters"] >= 1_000_000
    assert result["clients"] == 10
    assert result["payload_up"] == 532
    assert result["payload_up"] < row["up_bytes"] <= 1000
    # The model itself never travels, not even in the first round: 4 MB to each client.
    assert row["first_round_down_bytes"] < 20_000
