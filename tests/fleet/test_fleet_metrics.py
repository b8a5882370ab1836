"""Metrics of a fleet: what node processes report lands in the run store and at ``/metrics``."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from turnout.server import ClientRoundRow, RoundRow, RunDescription, RunRecorder, RunStore
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.server.metrics import FleetCollector, MetricsCallback, MetricsRegistry, MetricsServer
from turnout.strategies import FedAvg

CLIENTS, ROUNDS, SIZE = 4, 4, 20_000
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs the Debian package `prometheus` (apt-get install prometheus)",
)


def scrape(url: str, accept: str = "") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


@dataclass
class Watched:
    """A fleet whose run is over and whose endpoint still answers."""

    server: FleetServer
    url: str
    rounds: list[RoundRow]
    rows: list[ClientRoundRow]

    def samples(self) -> dict[tuple[str, tuple[str, ...]], float]:
        return {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in parse_text(scrape(self.url))
            for sample in family.samples
        }


@pytest.fixture(scope="module")
def watched(
    spawn_for_module: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    initial: Callable[..., Any],
) -> Iterator[Watched]:
    parent = tmp_path_factory.mktemp("runs")
    about = RunDescription(
        name="m", strategy="fedavg", task="none", seed=0, num_rounds=ROUNDS, num_clients=CLIENTS, config={}
    )
    registry = MetricsRegistry()
    with (
        RunStore(parent) as store,
        FleetServer(num_clients=CLIENTS) as server,
        MetricsServer("127.0.0.1:0", registry) as endpoint,
    ):
        registry.register(FleetCollector(server))
        for name, clients in (("a", "0-1"), ("b", "2-3")):
            spawn_for_module("numpy_app.py", server.address, clients, "--name", name, "--delay", "0.02")
        grid = FleetGrid(server, min_clients=CLIENTS, wait=30)
        with RunRecorder.create(store, parent, about) as recorder:
            metrics = MetricsCallback(registry, run=recorder.run.id, strategy="fedavg", recorder=recorder)
            callbacks = [recorder, CommitCallback(grid), metrics]
            FedAvg().start(grid, initial(SIZE), num_rounds=ROUNDS, timeout=30, callbacks=callbacks)
        run_id = recorder.run.id
        yield Watched(server, endpoint.url, store.rounds(run_id), store.client_rounds(run_id))


def test_what_a_node_measures_is_in_the_store(watched: Watched) -> None:
    assert len(watched.rows) == CLIENTS * ROUNDS
    for row in watched.rows:
        assert row.outcome == "ok"
        assert row.train_loss == 1.0 / row.round
        metrics = row.metrics or {}
        assert metrics["train-loss"] == row.train_loss
        assert metrics["num-examples"] == row.num_examples == 1 + row.client % 5
        assert 0 < metrics["task-seconds"] < 10
        assert metrics["reply-bytes"] == 4 * SIZE
        assert metrics["request-bytes"] >= 4 * SIZE
        assert metrics["samples-per-second"] == pytest.approx(row.num_examples / metrics["task-seconds"])
        assert 1 << 20 < metrics["memory-bytes"] < 1 << 40
        assert metrics["cpu-seconds"] > 0


def test_a_fleet_is_scraped(watched: Watched) -> None:
    values = watched.samples()
    replies = CLIENTS * ROUNDS
    assert values["turnout_rounds_total", ()] == ROUNDS
    assert values["turnout_clients_connected", ()] == CLIENTS
    assert values["turnout_clients_registered", ()] == CLIENTS
    assert values["turnout_clients_quarantined", ()] == 0
    assert values["turnout_client_replies_total", ("ok",)] == replies
    assert values["turnout_fleet_replies_total", ("accepted",)] == replies
    assert values["turnout_fleet_offers_total", ()] == replies
    assert values["turnout_received_bytes_total", ()] >= replies * 4 * SIZE
    assert values["turnout_sent_bytes_total", ()] >= 2 * ROUNDS * 4 * SIZE
    assert values["turnout_upload_slots", ("busy",)] == 0
    assert values["turnout_upload_slots", ("free",)] == watched.server.options.upload_slots
    assert values["turnout_quorum_missed_total", ()] == 0
    assert values["turnout_client_reply_seconds_count", ()] == replies
    said = sum((row.metrics or {})["task-seconds"] for row in watched.rows)
    assert values["turnout_client_reply_seconds_sum", ()] == pytest.approx(said)
    assert values["turnout_client_samples_per_second_count", ()] == replies
    assert values["turnout_client_reply_bytes_sum", ()] == replies * 4 * SIZE
    assert values["turnout_checkpoint_seconds_count", ()] == ROUNDS


def test_no_name_id_or_address_is_in_a_label(watched: Watched) -> None:
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        parse = parse_openmetrics if accept else parse_text
        for family in parse(scrape(watched.url, accept)):
            for sample in family.samples:
                assert sample.labels.keys() <= {
                    "le", "phase", "outcome", "kind", "state", "reason", "version", "flwr", "torch",
                }  # fmt: skip


def test_refusals_have_bounded_reasons(watched: Watched, raw_client: ModuleType) -> None:
    before = watched.samples()
    with raw_client.RawClient(watched.server.address, "old", 9, protocol=999) as client:
        assert client.receive("refusal").reason == "wrong-version"
    watched.server.counters.reasons["a-reason-of-tomorrow"] += 2
    watched.server.counters.reasons["another\nreason{}"] += 1
    after = watched.samples()
    assert after["turnout_refused_total", ("wrong-version",)] == 1
    assert before.get(("turnout_refused_total", ("other",)), 0.0) == 0
    assert after["turnout_refused_total", ("other",)] == 3


@needs_prometheus
def test_the_names_are_as_prometheus_wants_them(watched: Watched) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scrape(watched.url),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_prometheus
def test_prometheus_itself_scrapes_it(watched: Watched, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = urllib.parse.urlsplit(watched.url).netloc
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: turnout, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    process = subprocess.Popen(
        ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
         f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=error"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def value(query: str) -> float | None:
        try:
            result = ask("query", query=query)["result"]
        except OSError:
            return None
        return float(result[0]["value"][1]) if result else None

    try:
        end = time.monotonic() + 40
        while value("turnout_rounds_total") is None:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        assert value("turnout_rounds_total") == ROUNDS
        assert value('up{job="turnout"}') == 1
        assert value("histogram_quantile(0.5, turnout_client_reply_bytes_bucket)") is not None
        now = time.time()
        exemplars = ask(
            "query_exemplars",
            query="turnout_client_reply_seconds_bucket",
            start=str(now - 600),
            end=str(now + 60),
        )
        named = {e["labels"]["client"] for series in exemplars for e in series["exemplars"]}
        assert named
        assert named <= {str(client) for client in range(CLIENTS)}
    finally:
        process.terminate()
        process.wait(15)
