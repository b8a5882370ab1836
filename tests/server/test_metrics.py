"""A run's metrics, scraped over HTTP: what Prometheus reads is what happened."""

from __future__ import annotations

import gzip
import math
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MetricRecord
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from turnout.client import client_app
from turnout.server import RunDescription, RunRecorder, RunStore
from turnout.server.metrics import MetricsCallback, MetricsRegistry, MetricsServer
from turnout.simulation import Bernoulli, LocalGrid
from turnout.strategies import Callback, ClientReport, FedAvg
from turnout.tasks.digits import Digits
from turnout.wire import ConfigError

N, ROUNDS = 6, 5
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def read(url: str, **headers: str) -> tuple[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        body = answer.read()
        if answer.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        return body.decode(), answer.headers


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


class Scrape(Callback):
    """Scrapes after each round, as a monitoring system does during a run."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.texts: list[str] = []

    def on_round_end(self, report: Any) -> None:
        self.texts.append(read(self.url)[0])


def simulate(tmp_path: Path, registry: MetricsRegistry, url: str, **options: Any) -> tuple[Scrape, list[Any]]:
    task = Digits(num_clients=N, model="softmax", alpha=0.5, seed=1)
    about = RunDescription(
        name="m", strategy="fedavg", task="digits", seed=0, num_rounds=ROUNDS, num_clients=N, config={}
    )
    scrape = Scrape(url)
    with RunStore(tmp_path) as store, RunRecorder.create(store, tmp_path, about) as recorder:
        metrics = MetricsCallback(registry, run="abcd", strategy="fedavg", recorder=recorder, **options)
        grid = LocalGrid(
            client_app(task, lr=0.05, local_steps=2, batch_size=8),
            N,
            participation=Bernoulli([0.6] * N, seed=4),
        )
        FedAvg(num_clients=N).start(
            grid, task.initial_arrays(), num_rounds=ROUNDS,
            evaluate_fn=lambda _, arrays: MetricRecord(task.evaluate(arrays)),
            callbacks=[recorder, metrics, scrape],
        )  # fmt: skip
        return scrape, [store.rounds(recorder.run.id), store.client_rounds(recorder.run.id)]


@pytest.fixture
def served() -> Any:
    registry = MetricsRegistry()
    with MetricsServer("127.0.0.1:0", registry) as server:
        yield registry, server


def test_a_simulation_is_scraped(served: Any, tmp_path: Path) -> None:
    registry, server = served
    scrape, (rounds, rows) = simulate(tmp_path, registry, server.url)
    first, last = samples(scrape.texts[0]), samples(scrape.texts[-1])
    assert (first["turnout_rounds_total", ()], last["turnout_rounds_total", ()]) == (1, ROUNDS)
    assert last["turnout_round_seconds_count", ()] == ROUNDS
    ok = [row for row in rows if row.outcome == "ok"]
    assert last["turnout_client_replies_total", (("outcome", "ok"),)] == len(ok)
    assert last["turnout_client_replies_total", (("outcome", "rejected"),)] == 0
    assert last["turnout_cohort_size", ()] == rounds[-1].invited
    assert last["turnout_client_staleness_rounds_count", ()] == len(ok)
    assert last["turnout_client_staleness_rounds_sum", ()] == sum(row.staleness for row in ok)
    assert last["turnout_client_weight_ratio_sum", ()] == pytest.approx(len(ok))
    assert last["turnout_client_reply_seconds_sum", ()] == pytest.approx(sum(row.train_seconds for row in ok))
    assert last["turnout_checkpoint_seconds_count", ()] == ROUNDS
    assert last["turnout_checkpoint_bytes", ()] > 0
    assert last["turnout_run_info", (("run", "abcd"), ("strategy", "fedavg"))] == 1
    assert last["turnout_run_loss", (("run", "abcd"),)] > 0
    assert time.time() - 60 < last["turnout_last_commit_timestamp_seconds", ()] <= time.time()
    assert last["turnout_memory_bytes", (("kind", "process"),)] > 1 << 20
    missed = sum(row.participants == 0 for row in rounds)
    assert last["turnout_quorum_missed_total", ()] == missed
    after = samples(read(server.url)[0])
    assert not [key for key in after if key[0].startswith("turnout_run_")]  # No longer live.


def test_a_round_does_not_end_in_the_last_bucket(served: Any, tmp_path: Path) -> None:
    registry, server = served
    scrape, _ = simulate(tmp_path, registry, server.url)
    values = samples(scrape.texts[-1])
    names = {name.removesuffix("_bucket") for name, _ in values if name.endswith("_bucket")}
    assert len(names) >= 8
    for (name, labels), value in values.items():
        if name.endswith("_bucket") and dict(labels)["le"] == "+Inf":
            finite = [
                v for (other, rest), v in values.items()
                if other == name and dict(rest)["le"] != "+Inf"
                and {**dict(rest), "le": ""} == {**dict(labels), "le": ""}
            ]  # fmt: skip
            assert max(finite) == value, name


def test_openmetrics_names_the_client_of_a_bucket(served: Any, tmp_path: Path) -> None:
    registry, server = served
    _, (_, rows) = simulate(tmp_path, registry, server.url)
    text, headers = read(server.url, Accept=OPENMETRICS)
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    seconds = {(str(row.client), str(row.round)): row.train_seconds for row in rows if row.outcome == "ok"}
    seen = 0
    for family in parse_openmetrics(text):
        for sample in family.samples:
            if sample.exemplar is not None and family.name == "turnout_client_reply_seconds":
                labels = sample.exemplar.labels
                assert seconds[labels["client"], labels["round"]] == sample.exemplar.value
                seen += 1
    assert seen
    plain, headers = read(server.url)
    assert headers["Content-Type"].startswith("text/plain")
    assert "client=" not in plain
    assert "_created" not in text


def test_no_client_is_a_label_unless_asked_for(served: Any, tmp_path: Path) -> None:
    registry, server = served
    scrape, (_, rows) = simulate(tmp_path, registry, server.url, per_client=True)
    values = samples(scrape.texts[-1])
    losses = {row.client: row.train_loss for row in rows if row.outcome == "ok"}
    for client, loss in losses.items():
        assert values["turnout_per_client_train_loss", (("client", str(client)),)] == loss


def test_per_client_metrics_are_for_small_fleets(tmp_path: Path) -> None:
    metrics = MetricsCallback(MetricsRegistry(), run="r", strategy="s", per_client=True)
    with pytest.raises(ConfigError, match=r"at most 200 clients and this run has 201"):
        metrics.on_start(FedAvg(num_clients=201), num_rounds=1, first_round=1)
    metrics.on_start(FedAvg(num_clients=200), num_rounds=1, first_round=1)
    everyone = MetricsCallback(MetricsRegistry(), run="r", strategy="s")
    everyone.on_start(FedAvg(num_clients=10_000), num_rounds=1, first_round=1)


def test_absurd_numbers_of_clients_spoil_nothing(report: Callable[..., Any]) -> None:
    registry = MetricsRegistry()
    metrics = MetricsCallback(registry, run="r", strategy="s")
    clients = [
        ClientReport(i, "ok", "", 1, 0.5, metrics={"task-seconds": value, "reply-bytes": value})
        for i, value in enumerate((1.0, math.nan, math.inf, -5.0, 1e300, 3.0))
    ]
    made = report(1, clients=clients)
    made.strategy.clients = FedAvg(num_clients=6).clients
    metrics.on_round_end(made)
    assert registry.get_sample_value("turnout_client_reply_seconds_count") == 2
    assert registry.get_sample_value("turnout_client_reply_seconds_sum") == 4.0


def test_a_large_cohort_costs_little_and_prints_little(report: Callable[..., Any]) -> None:
    registry = MetricsRegistry()
    metrics = MetricsCallback(registry, run="r", strategy="s")
    said = {"task-seconds": 0.5, "reply-bytes": 1e6, "samples-per-second": 90.0, "memory-bytes": 1e8}
    made = report(1, clients=[ClientReport(i, "ok", "", 1, 0.001, metrics=said) for i in range(1000)])
    made.strategy.clients = FedAvg(num_clients=1000).clients
    metrics.on_round_end(made)
    began = time.perf_counter()
    metrics.on_round_end(made)
    assert time.perf_counter() - began < 0.5  # About 10 ms when nothing else runs.
    with MetricsServer("127.0.0.1:0", registry) as server:
        text = read(server.url)[0]
    assert len(text.splitlines()) < 400


# The endpoint.


def test_only_two_paths_exist(served: Any) -> None:
    _, server = served
    base = server.url.removesuffix("/metrics")
    assert read(f"{base}/healthz")[0] == "ok\n"
    assert read(f"{base}/metrics?x=1")[0].startswith("# HELP")
    for path, method, status in (
        ("/", "GET", 404),
        ("/../etc/passwd", "GET", 404),
        ("/metrics", "POST", 501),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(base + path, method=method), timeout=10)
        assert refused.value.code == status
        assert re.search(r"turnout\s*$", refused.value.headers["Server"])
    with urllib.request.urlopen(urllib.request.Request(server.url, method="HEAD"), timeout=10) as answer:
        assert int(answer.headers["Content-Length"]) > 100
        assert answer.read() == b""


def test_scrapes_are_zipped_on_request(served: Any) -> None:
    registry, server = served
    MetricsCallback(registry, run="r", strategy="s")
    plain, headers = read(server.url)
    assert headers["Content-Encoding"] is None
    zipped, headers = read(server.url, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert len(zipped.splitlines()) == len(plain.splitlines())


def test_idle_connections_are_bounded_and_do_not_pile_up(served: Any) -> None:
    _, server = served
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
    try:
        for _ in range(3):  # Every place is taken: more connections are dropped, not queued for ever.
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                read(server.url)
    finally:
        for connection in idle:
            connection.close()
    end = time.monotonic() + 10
    while True:
        try:
            assert read(server.url)[0]
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_addresses_that_cannot_be_used_say_why() -> None:
    registry = MetricsRegistry()
    for address, why in (
        ("9100", "host:port"),
        ("127.0.0.1:http", "host:port"),
        ("127.0.0.1:99999", "host:port"),
        ("0.0.0.0:0", "reachable from other machines"),
        ("192.0.2.1:9100", "reachable"),
    ):
        with pytest.raises(ConfigError, match=why):
            MetricsServer(address, registry)
    with MetricsServer("127.0.0.1:0", registry) as first, pytest.raises(ConfigError, match="cannot be used"):
        MetricsServer(f"127.0.0.1:{first.port}", registry)
    with MetricsServer("0.0.0.0:0", registry, insecure=True) as open_to_all:
        assert read(f"http://127.0.0.1:{open_to_all.port}/healthz")[0] == "ok\n"


def test_nothing_imports_prometheus_before_it_is_asked_for() -> None:
    code = (
        "import sys, turnout.wire, turnout.client.node, turnout.server; "
        "import turnout.server.fleet, turnout.server.ledger; "
        "assert 'prometheus_client' not in sys.modules; import turnout.server.metrics; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
