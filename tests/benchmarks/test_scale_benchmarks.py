"""The benchmarks of many clients run and print what they promise; how fast is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *arguments: str) -> dict[str, Any]:
    """Return the one JSON line that the benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


def test_round_cost() -> None:
    result = run("round_cost.py", "--rounds", "3", "--only", "fedavg,fedstale mmap", "--clients", "100,2000")
    assert list(result["figures"]) == ["fedavg", "fedstale mmap"]
    for sizes in result["figures"].values():
        assert list(sizes) == ["100", "2000"]
        assert all(figures["ms"] > 0 and figures["checkpoint_kb"] > 1 for figures in sizes.values())


def test_memory_beyond_ram(tmp_path: Path) -> None:
    result = run(
        "memory_beyond_ram.py", "--clients", "300", "--parameters", "20000", "--rounds", "4",
        "--baseline-mb", "10", "--directory", str(tmp_path),
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    assert result["round_seconds"]["median"] > 0
    # All rows, and those replaced in the three rounds that checkpoints or the run itself need.
    assert result["vectors_gb"] <= result["file_gb"] <= 2.2 * result["vectors_gb"]
    assert result["checkpoint_mb"] < 1
