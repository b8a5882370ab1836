"""What every strategy must do, whatever its rule: one table of strategies, one test per behaviour."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from scripted_grid import Client, Order, ScriptedGrid, failing, shuffled, silent
from strategy_table import KEYS, NODES, ROWS, Row, federation, initial

from turnout.strategies import Callback, RoundReport
from turnout.wire import load_checkpoint, save_checkpoint, view

every_strategy = pytest.mark.parametrize("row", ROWS, ids=str)
ROUNDS = 6


def present(server_round: int) -> list[int]:
    """Everyone at first, nobody in round 4, else about two thirds."""
    if server_round == 1:
        return list(NODES)
    if server_round == 4:
        return []
    on = np.random.default_rng([5, server_round]).random(len(NODES)) < 0.65
    return [node for node, there in zip(NODES, on, strict=True) if there]


class Trace(Callback):
    """The model after each round, and each round's report."""

    def __init__(self) -> None:
        self.models: list[bytes] = []
        self.reports: list[RoundReport] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.models.append(as_bytes(report.arrays))
        self.reports.append(report)

    def outcomes(self, server_round: int) -> dict[int, str]:
        report = next(r for r in self.reports if r.server_round == server_round)
        return {client.client: client.outcome for client in report.clients}


def as_bytes(arrays: ArrayRecord) -> bytes:
    return b"".join(name.encode() + view(array).tobytes() for name, array in arrays.items())


def run(row: Row, clients: dict[int, Client] | None = None, **options: Any) -> Trace:
    trace, start = Trace(), options.pop("start", None)
    rounds = options.pop("rounds", ROUNDS)
    grid = ScriptedGrid(clients or federation(), options.pop("available", present), **options)
    row.strategy().start(grid, start or initial(), num_rounds=rounds, callbacks=[trace])
    return trace


@cache
def plain(row: Row) -> Trace:
    """The undisturbed run that others are compared with."""
    return run(row)


def by_node(server_round: int, replies: list[Message]) -> list[Message]:
    return sorted(replies, key=lambda m: m.metadata.src_node_id)


def backwards(server_round: int, replies: list[Message]) -> list[Message]:
    return replies[::-1]


@every_strategy
def test_arrival_order_does_not_matter_to_the_bit(row: Row) -> None:
    orders: list[Order] = [by_node, backwards, shuffled(1)]
    # Updates of very different magnitude, where plain sums would round differently.
    clients: Callable[[], dict[int, Client]] = lambda: {  # noqa: E731
        node: setting(client, scale=10.0 ** (i - 3)) for i, (node, client) in enumerate(federation().items())
    }
    traces = [run(row, clients(), order=order) for order in orders]
    assert len({tuple(trace.models) for trace in traces}) == 1
    assert len(set(traces[0].models)) > 1  # The models do move.


def setting(client: Client, **values: Any) -> Client:
    for name, value in values.items():
        setattr(client, name, value)
    return client


@every_strategy
def test_list_generator_and_bytes_give_the_same(row: Row) -> None:
    direct = plain(row)
    assert run(row, lazily=True).models == direct.models
    assert run(row, lazily=True, through_bytes=True).models == direct.models


@every_strategy
def test_an_error_reply_is_like_no_reply(row: Row) -> None:
    first, second = (federation() | {NODES[1]: client, NODES[4]: client} for client in (failing, silent))
    failed, missing = run(row, first), run(row, second)
    assert failed.models == missing.models
    for trace, outcome in ((failed, "failed"), (missing, "missing")):
        outcomes = trace.outcomes(1)
        asked = {client.client for client in trace.reports[0].clients}
        # Clients that never said who they are go by their node.
        expected = {node for node in (NODES[1], NODES[4]) if node in asked}
        assert {client for client, seen in outcomes.items() if seen == outcome} == expected
        metrics = trace.reports[0].train_metrics
        assert metrics["failed" if outcome == "failed" else "missing"] == len(expected)
        assert metrics["participants"] == len(outcomes) - len(expected)
    reasons = {c.reason for c in failed.reports[0].clients if c.outcome == "failed"}
    assert all("out of memory" in reason for reason in reasons)


@every_strategy
def test_empty_rounds(row: Row) -> None:
    everyone_fails = run(row, dict.fromkeys(NODES, failing), rounds=3)
    nobody_there = run(row, available=lambda _: [], rounds=3)
    for trace in (everyone_fails, nobody_there):
        assert set(trace.models) == {as_bytes(initial())}  # Nothing is known, nothing moves.
    later = plain(row)
    assert later.reports[3].clients == []
    assert later.reports[3].train_metrics["participants"] == 0
    moves_by_memory = row.name.startswith(("mifa", "fedstale", "fedvarp-het")) and row.name != "fedstale-skip"
    assert (later.models[3] != later.models[2]) == moves_by_memory
    for report in later.reports:
        assert all(math.isfinite(v) for v in report.diagnostics.values()), report.diagnostics


@every_strategy
@pytest.mark.parametrize("stop", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(row: Row, stop: int, tmp_path: Path) -> None:
    whole = plain(row)
    path = tmp_path / "round.safetensors"

    class Save(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            save_checkpoint(path, report.checkpoint())

    first = ScriptedGrid(federation(), present)
    row.strategy().start(first, initial(), num_rounds=stop, callbacks=[Save()])
    rest = Trace()
    # Another initial model: everything must come from the checkpoint.
    grid = ScriptedGrid(federation(), present, first_round=stop + 1)
    strategy = row.strategy()
    result = strategy.start(grid, initial(1), num_rounds=ROUNDS, callbacks=[rest], resume_from=path)
    assert rest.models == whole.models[stop:]
    assert as_bytes(result.arrays) == whole.models[-1]
    for mine, other in zip(rest.reports, whole.reports[stop:], strict=True):
        assert mine.diagnostics == other.diagnostics
        assert mine.train_metrics == other.train_metrics
        assert [(c.client, c.staleness) for c in mine.clients] == [
            (c.client, c.staleness) for c in other.clients
        ]
    again = ScriptedGrid(federation(), present)
    tree = load_checkpoint(path)
    done = row.strategy().start(again, initial(1), num_rounds=stop, resume_from=tree)
    assert as_bytes(done.arrays) == whole.models[stop - 1]
    assert again.sent == []


@every_strategy
def test_under_flowers_own_loop(row: Row) -> None:
    ours = plain(row)
    models = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        models.append(as_bytes(arrays))
        return MetricRecord({"round": server_round})

    grid = ScriptedGrid(federation(), present, exchanges=2)
    strategy = row.strategy()
    result = Strategy.start(strategy, grid, initial(), num_rounds=ROUNDS, evaluate_fn=evaluate)
    assert models[1:] == ours.models
    assert result.train_metrics_clientapp[1]["participants"] == len(ours.reports[0].clients)
    assert sorted(result.evaluate_metrics_serverapp) == list(range(ROUNDS + 1))
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 3, 5, 6]  # Round 4: nobody there.


@every_strategy
@pytest.mark.parametrize("loop", ["own", "flower"])
def test_a_strategy_object_can_be_used_again(row: Row, loop: str) -> None:
    strategy = row.strategy()
    models = []
    for _ in range(2):
        exchanges = 1 if loop == "own" else 2
        grid = ScriptedGrid(federation(), present, exchanges=exchanges)
        start = strategy.start if loop == "own" else lambda *a, **k: Strategy.start(strategy, *a, **k)
        models.append(as_bytes(start(grid, initial(), num_rounds=2).arrays))
    assert models[0] == models[1]


@every_strategy
def test_requests_follow_the_contract(row: Row) -> None:
    grid = ScriptedGrid(federation(), present)
    strategy = row.strategy()
    strategy.start(grid, initial(), num_rounds=3, train_config=ConfigRecord({"lr": 0.5}))
    for server_round, requests in enumerate(grid.sent, start=1):
        nodes = [m.metadata.dst_node_id for m in requests]
        assert len(set(nodes)) == len(nodes)
        assert set(nodes) <= set(present(server_round))
        for message in requests:
            config = message.content["config"]
            assert (config["server-round"], config["lr"]) == (server_round, 0.5)
            assert isinstance(config["local-update"], str)
            assert message.metadata.group_id == str(server_round)
            assert list(message.content["arrays"]) == list(initial())
            extras = set(message.content) - {"arrays", "config"}
            assert extras <= {"bullseye", "control", "implicit", "initial", "prior"}
            for name in extras:  # Buffers belong to the model alone.
                assert list(message.content[name]) == ["fc.weight", "fc.bias", "scale"]
        # One copy for all.
        if len(requests) > 1:
            a, b = (m.content["arrays"]["fc.weight"] for m in requests[:2])
            assert a is b or np.shares_memory(view(a), view(b))


@every_strategy
def test_buffers_are_averaged_plainly_over_the_participants(row: Row) -> None:
    grid = ScriptedGrid(federation(), lambda _: [NODES[0], NODES[2], NODES[5]])
    trace = Trace()
    row.strategy().start(grid, initial(), num_rounds=2, callbacks=[trace])
    buffers = {
        "bn.running_mean": np.full(3, 0.25),
        "bn.running_var": np.array(1 / 3),
        "bn.num_batches_tracked": np.array(5.0),
    }
    for report, requests in zip(trace.reports, grid.sent, strict=True):
        replies = [grid.clients[m.metadata.dst_node_id].content(m) for m in requests]  # type: ignore[attr-defined]
        for name in buffers:
            seen = [view(reply["arrays"][name]) for reply in replies if "arrays" in reply]
            if seen:
                buffers[name] = np.mean(np.float64(seen), axis=0)
            expected = np.rint(buffers[name]) if "num" in name else np.float32(buffers[name])
            np.testing.assert_allclose(view(report.arrays[name]), expected, rtol=1e-6)


@every_strategy
def test_reports_are_complete(row: Row) -> None:
    trace = plain(row)
    last_seen: dict[int, int] = {}
    for report in trace.reports:
        clients = [c for c in report.clients if c.outcome == "ok"]
        assert {c.client for c in clients} <= set(KEYS)
        for c in clients:
            assert c.staleness == (report.server_round - last_seen[c.client] if c.client in last_seen else 0)
            last_seen[c.client] = report.server_round
            assert c.num_examples > 0
            assert c.train_loss == 1 / report.server_round
            assert c.update_norm > 0
            assert math.isfinite(c.weight) or c.role == "anchor"
        assert set(report.seconds) == {"select", "train", "fold", "finish", "evaluate"}
    for report in trace.reports:
        if report.train_metrics["participants"]:
            assert report.train_metrics["train-loss"] == pytest.approx(1 / report.server_round)
    sgd_like = ("fedavg", "fedprox", "scaffold", "feddyn", "fedamd", "dual-admm-two", "rerce-fed-sch")
    if row.name.startswith(sgd_like):
        weights = [c.weight for c in trace.reports[1].clients if c.role != "anchor"]
        assert not weights or sum(weights) == pytest.approx(1.0)
