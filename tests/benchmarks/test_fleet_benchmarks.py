"""Every fleet benchmark runs and prints what it promises; how fast is no matter here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *arguments: str, timeout: float = 90) -> dict[str, Any]:
    """Return the one JSON line that the benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    result: dict[str, Any] = json.loads(lines[0])
    assert result["benchmark"] == name.replace("_", "-")
    return result


def is_ratio(value: float) -> bool:
    return math.isfinite(value) and value > 0


def check_rows(result: dict[str, Any], *figures: str) -> None:
    assert [row["figure"] for row in result["rows"]] == list(figures)
    for row in result["rows"]:
        assert is_ratio(row["ratio"]), row
        assert is_ratio(row["ours"]), row
        assert is_ratio(row["limit_value"]), row
        assert row["target"][:2] in ("<=", ">="), row


TINY = ("--megabytes", "2", "--turns", "2")


def test_uploads() -> None:
    result = run("fleet_throughput", *TINY, "--only", "upload", "--clients", "2")
    name = "upload-2"
    check_rows(
        result, f"{name}-gb-per-s-of-tcp", f"{name}-gb-per-s-of-bare-grpc", f"{name}-server-cpu-s-per-gb"
    )


def test_uploads_under_mutual_tls() -> None:
    result = run("fleet_throughput", *TINY, "--only", "mtls", "--clients", "1")
    name = "mtls-upload-1-gb-per-s-of"
    check_rows(result, f"{name}-ssl-socket", f"{name}-bare-grpc-mtls", f"{name}-plain")


def test_broadcasts() -> None:
    result = run("fleet_throughput", *TINY, "--only", "broadcast", "--clients", "1", "2")
    figures = ("s-per-gb", "with-encoding-s-per-gb", "server-cpu-s-per-gb")
    check_rows(result, *(f"broadcast-{clients}-{figure}" for clients in (1, 2) for figure in figures))
    assert math.isfinite(result["broadcast_growth_per_further_client_of_model"])


def test_latency() -> None:
    result = run("fleet_latency", "--quick")
    assert [row["clients"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        for name in ("round_p50_ms", "bare_p50_ms", "ratio"):
            assert is_ratio(row[name]), row


def test_memory() -> None:
    result = run("fleet_memory", "--cohorts", "2", "5", "--megabytes", "1")
    assert [row["clients"] for row in result["rows"]] == [2, 5]
    for row in result["rows"]:
        assert is_ratio(row["ratio"])
        assert 0 < row["idle_mb"] < row["peak_mb"]
        assert row["peak_mb"] == max(row[phase] for phase in ("broadcast_mb", "uploads_mb", "finish_mb"))
    assert result["compared"] == [5, 2]
    assert is_ratio(result["growth_ratio"])


def test_connections() -> None:
    result = run("fleet_connections", "--clients", "40", "--cohort", "10", "--turns", "1", "--rounds", "2")
    assert result["clients"] == result["clients_asked"] == 40
    assert result["errors"] == result["lost_streams"] == 0
    for name in ("memory_ratio", "push_ratio", "transport_ratio", "connect_ratio", "round_s"):
        assert is_ratio(result[name]), name


def test_the_fleets_side_of_the_superlink_pair() -> None:
    result = run("fleet_superlink", "--fleet-only", "--fleet-rounds", "5")
    assert is_ratio(result["turnout_round_ms"])
    assert is_ratio(result["turnout_with_flowers_fedavg_round_ms"])
    assert "ratio" not in result


@pytest.mark.slow
def test_the_superlink_pair() -> None:
    result = run("fleet_superlink", "--quick", timeout=170)
    assert is_ratio(result["ratio"])
    assert is_ratio(result["ratio_with_flowers_fedavg"])
    assert len(result["superlink_rounds_s"]) == 1
