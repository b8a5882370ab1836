"""``--metrics-port`` of servers and clients: what a scraper reads while they work."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fleet_commands import PATIENCE, Turnout, free_port, own, start_own
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from turnout.client.node import telemetry
from turnout.client.node.metrics import NodeMetrics
from turnout.wire.metrics_endpoint import MetricsServer
from turnout.wire.metrics_registry import MetricsRegistry


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def wait_for(port: int, name: str, at_least: float) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the first scrape in which the metric ``name`` is ``at_least`` so large."""
    end = time.monotonic() + PATIENCE
    values: dict[tuple[str, tuple[str, ...]], float] = {}
    while time.monotonic() < end:
        try:
            values = samples(scrape(port))
        except OSError:
            values = {}
        if any(value >= at_least for (found, labels), value in values.items() if (found, *labels)[0] == name):
            return values
        time.sleep(0.05)
    raise AssertionError(f"{name} never was {at_least}: {values}")


def test_node_and_server_are_scraped_with_certificates(turnout: Turnout, place: Path) -> None:
    own(place, 0.2)
    turnout("certs", "init", "pki", "--days", "10").end()
    turnout("certs", "client", "edge-1", "--dir", "pki", "--days", "20").end()
    address, of_server, of_node = f"127.0.0.1:{free_port()}", free_port(), free_port()
    server = start_own(
        turnout, address, "own.toml", "--certs", "pki", "--metrics-port", of_server,
        "--per-client-metrics", "--set", "run.rounds=12", "--log-to", "tensorboard",
    )  # fmt: skip
    node = turnout(
        "client", "--server", address, "--app", "own_app:app", "--certs", "pki", "--name", "edge-1",
        "--clients", "0-1", "--metrics-address", f"127.0.0.1:{of_node}", "--json",
    )  # fmt: skip
    seen = wait_for(of_node, "turnout_node_tasks_total", 4)
    assert seen["turnout_node_connected", ()] == 1
    assert seen["turnout_node_clients", ()] == 2
    assert seen["turnout_node_sessions_total", ()] == 1
    accepted = seen["turnout_node_tasks_total", ("accepted",)]
    trained = seen["turnout_node_train_seconds_count", ()]
    assert trained >= accepted >= 4
    assert seen["turnout_node_train_seconds_sum", ()] >= 0.2 * trained
    assert 1 <= seen["turnout_node_samples_total", ()] / trained <= 2  # Clients with 1 and 2 examples.
    assert seen["turnout_node_received_bytes_total", ()] > 50 * 4
    assert seen["turnout_node_sent_bytes_total", ()] > accepted * 50 * 4
    assert not [name for name, _ in seen if "gpu" in name] or telemetry.gpu_names()
    days = (seen["turnout_certificate_expiry_timestamp_seconds", ("node",)] - time.time()) / 86400
    assert 19 < days <= 20
    served = wait_for(of_server, "turnout_rounds_total", 2)
    days = (served["turnout_certificate_expiry_timestamp_seconds", ("server",)] - time.time()) / 86400
    assert 9 < days <= 10
    assert served["turnout_per_client_last_round", ("1",)] >= 1
    if shutil.which("promtool"):
        done = subprocess.run(
            ["promtool", "check", "metrics"],
            input=scrape(of_node),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    rounds = server.end()["rounds"]
    node.end()
    (events,) = (place / "runs").glob("*/tensorboard")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert len(accumulator.Scalars("clients/ok")) == rounds == 12


def test_a_nodes_log_says_run_round_and_client(
    turnout: Turnout, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(place, 0)
    (place / "pause").unlink()  # The app fails for want of it.
    monkeypatch.setenv("TURNOUT_LOG_FORMAT", "json")
    address = f"127.0.0.1:{free_port()}"
    server = start_own(turnout, address, "own.toml", "--set", "run.rounds=2")
    node = turnout("client", "--server", address, "--app", "own_app:app", "--clients", "0-1", "--json")
    run_id = server.end()["run_id"]
    node.end()
    failures = [line for line in map(json.loads, node.said().splitlines()) if "Traceback" in line["message"]]
    assert {(line["run"], line["round"], line["client"]) for line in failures} == {
        (run_id, server_round, client) for server_round in (1, 2) for client in (0, 1)
    }
    told = [line for line in map(json.loads, server.said().splitlines()) if line.get("client") == 1]
    assert [(line["run"], line["round"]) for line in told] == [(run_id, 1), (run_id, 2)]


def test_labels_of_a_node_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"gpu-memory-bytes": 5.0, "gpu-utilization": 0.25, "cpu-seconds": 1.0}
    monkeypatch.setattr(telemetry, "of_node", lambda: measured)
    registry = MetricsRegistry()
    metrics = NodeMetrics(registry)
    for _ in range(3):
        metrics.settled("failed")
    metrics.worked(0.5, trained=True, examples=0, failed=True)
    with MetricsServer("127.0.0.1:0", registry) as server:
        text = scrape(server.port)
    values = samples(text)
    assert values["turnout_node_tasks_total", ("failed",)] == 3
    assert values["turnout_node_tasks_total", ("accepted",)] == 0
    assert values["turnout_node_train_seconds_count", ()] == 0
    assert values["turnout_node_gpu_memory_bytes", ()] == 5
    assert values["turnout_node_gpu_utilization_ratio", ()] == 0.25
    assert ("turnout_node_gpu_device_memory_bytes", ()) not in values  # Not measured: no number.
    labels = {key for family in parse_text(text) for sample in family.samples for key in sample.labels}
    assert labels <= {"le", "outcome", "kind", "version", "flwr", "torch"}


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--metrics-address", "0.0.0.0:9100"], "say --metrics-open", 2),
        (["--metrics-address", "127.0.0.1:1", "--metrics-port", "2"], "both say where", 2),
        (["--per-client-metrics"], "needs --metrics-address", 2),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], said: str, code: int, turnout: Turnout, place: Path
) -> None:
    own(place, 0)
    refused: Any = start_own(turnout, f"127.0.0.1:{free_port()}", "own.toml", *arguments)
    refused.end(code)
    assert said in refused.said()
    assert not (place / "runs").exists()


def test_per_client_metrics_are_refused_for_large_fleets(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    large = start_own(
        turnout, f"127.0.0.1:{free_port()}", "own.toml", "--set", "task.num_clients=201",
        "--metrics-port", "0", "--per-client-metrics", "--set", "fleet.wait=60",
    )  # fmt: skip
    large.end(2)
    assert "at most 200 clients and this run has 201" in large.said()
    assert "--per-client-metrics" in large.said()


def test_a_nodes_address_in_use_is_said(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    with MetricsServer("127.0.0.1:0", MetricsRegistry()) as other:
        node = turnout(
            "client", "--server", "127.0.0.1:1", "--app", "own_app:app", "--metrics-port", other.port
        )
        node.end(3)
    assert "cannot be used" in node.said()
