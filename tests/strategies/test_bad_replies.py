"""Replies that must not be believed: each is refused and counted, and the model is as if it had not come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from culprits import (
    BAD_ROUND,
    CULPRIT,
    Culprit,
    Reports,
    absent_once,
    bad,
    bias,
    everyone,
    metrics,
    metrics_as_config,
    record,
    run,
    scalar,
    without_metrics,
    without_vector,
)
from flwr.app import Array, ArrayRecord, Message, RecordDict
from scripted_grid import Client, ScriptedGrid, SyntheticClient
from strategy_table import KEYS, NODES, ROWS, Row, federation, initial

from turnout.strategies import FedAvg, Scaffold, UnbiasedFedAvg
from turnout.wire import ConfigError, as_array, keys
from turnout.wire.flower import error_reply, reply, request

SOME_NAMES = ("fedavg", "fedstale-estimate", "fedamd-warm", "rerce-fed", "scaffold")
SOME = [row for row in ROWS if row.name in SOME_NAMES]


BAD: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "wrong shape": (record(fc_bias=np.zeros(5, np.float32)), "wrong-layout"),
    "flattened": (record(fc_weight=np.zeros(20, np.float32)), "wrong-layout"),
    "double": (record(fc_bias=np.zeros(4)), "wrong-layout"),
    "integers": (record(fc_bias=np.zeros(4, np.int32)), "wrong-layout"),
    "missing tensor": (record(scale=None), "wrong-layout"),
    "unknown tensor": (record(extra=np.zeros(2, np.float32)), "wrong-layout"),
    "lying shape": (record(fc_bias=scalar("(5,)")), "wrong-layout"),
    "lying length": (record(fc_bias=scalar("(4,)", 12)), "wrong-layout"),
    "absurd shape": (record(fc_bias=scalar(f"({2**70},)")), "wrong-layout"),
    "no npy": (record(fc_bias=Array("float32", (4,), "numpy.ndarray", b"hello")), "wrong-layout"),
    "tokenizer bomb": (record(fc_bias=scalar("((((", 0)), "wrong-layout"),
    "unknown stype": (record(fc_bias=Array("float32", (4,), "brotli", b"")), "wrong-layout"),
    "nan": (bias(math.nan), "non-finite"),
    "inf": (bias(math.inf), "non-finite"),
    "minus inf": (bias(-math.inf), "non-finite"),
    "1e30": (bias(1e30), "too-large"),
    "-1e17": (bias(-1e17), "too-large"),
    "no examples": (metrics(num_examples=0), "bad-metric"),
    "negative examples": (metrics(num_examples=-1), "bad-metric"),
    "nan examples": (metrics(num_examples=math.nan), "bad-metric"),
    "infinite examples": (metrics(num_examples=math.inf), "bad-metric"),
    "half an example": (metrics(num_examples=1.5), "bad-metric"),
    "2**62 examples": (metrics(num_examples=2**62), "bad-metric"),
    "10**400 examples": (metrics(num_examples=10**400), "bad-metric"),
    "examples missing": (metrics(num_examples=None), "bad-metric"),
    "examples are a list": (metrics(num_examples=[1, 2]), "bad-metric"),
    "endless metric name": (metrics(**{"x" * 200: 1.0}), "bad-metric"),
    "metric name with newline": (metrics(**{"loss\nrole": 1.0}), "bad-metric"),
    "metric name that turns the text around": (metrics(**{"\u202essol": 1.0}), "bad-metric"),
    "nan client-id": (metrics(client_id=math.nan), "bad-metric"),
    "half a client-id": (metrics(client_id=2.5), "bad-metric"),
    "2**63 client-id": (metrics(client_id=2**63), "bad-metric"),
    "another client's id": (metrics(client_id=KEYS[0]), "duplicate"),
    "a node's id as client-id": (metrics(client_id=NODES[-1]), "bad-metric"),
    "no metrics": (without_metrics, "no-metrics"),
    "metrics as text": (metrics_as_config, "no-metrics"),
    "no vector": (without_vector, "wrong-layout"),
}  # fmt: skip


@pytest.mark.parametrize("row", SOME, ids=str)
def test_refused_counted_and_without_a_trace_in_the_model(row: Row) -> None:
    row = everyone(row)
    expected = run(row, absent_once())
    assert expected.rounds[1].train_metrics["missing"] == 1
    for name, (change, reason) in BAD.items():
        reports = run(row, bad(change))
        assert reports.models == expected.models, name
        report = reports.rounds[BAD_ROUND - 1]
        assert report.train_metrics["rejected"] == 1, name
        assert report.train_metrics["missing"] == 0, name
        assert report.train_metrics["participants"] == len(NODES) - 1, name
        refused = [c for c in report.clients if c.outcome == "rejected"]
        assert [c.client for c in refused] == [KEYS[CULPRIT]], name
        assert refused[0].reason.startswith(f"{reason}: "), f"{name}: {refused[0].reason}"
        assert len(refused[0].reason) > len(reason) + 20, name


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_strategy_refuses_poison(row: Row) -> None:
    expected = run(row, absent_once())
    for name in ("nan", "1e30", "wrong shape", "no vector", "no examples"):
        assert run(row, bad(BAD[name][0])).models == expected.models, name


class Twice(SyntheticClient):
    def __call__(self, message: Message) -> Message | Iterable[Message]:
        return [super().__call__(message), super().__call__(message)]  # type: ignore[list-item]


class TwoFaces(SyntheticClient):
    """Replies a second time under a client-id of its own making, to count twice."""

    def __call__(self, message: Message) -> Message | Iterable[Message]:
        invented = SyntheticClient(123_456, number=self.number, examples=self.examples)
        return [super().__call__(message), invented(message)]  # type: ignore[list-item]


class FromNowhere(SyntheticClient):
    """Sends a good reply, and another one as a node that nobody asked."""

    def __call__(self, message: Message) -> Message | Iterable[Message]:
        stranger = request(message.content, dst_node_id=777, group_id=message.metadata.group_id)
        return [super().__call__(message), super().__call__(stranger)]  # type: ignore[list-item]


class LateToo(SyntheticClient):
    """Sends its good reply again in the next round, as a slow network would, before the new one."""

    kept: Message | None = None

    def __call__(self, message: Message) -> Message | Iterable[Message]:
        old, self.kept = self.kept, reply(self.content(message), to=message)
        return [m for m in (old, self.kept) if m is not None]


@pytest.mark.parametrize("row", SOME, ids=str)
@pytest.mark.parametrize(
    ("kind", "reason", "rounds"),
    [
        (Twice, "duplicate", [1, 2, 3]),
        (TwoFaces, "duplicate", [1, 2, 3]),
        (FromNowhere, "unknown-client", [1, 2, 3]),
        (LateToo, "late", [2, 3]),
    ],
)
def test_replies_too_many(row: Row, kind: type[SyntheticClient], reason: str, rounds: list[int]) -> None:
    row = everyone(row)
    honest = run(row, SyntheticClient(KEYS[CULPRIT], number=CULPRIT, examples=33))
    reports = run(row, kind(KEYS[CULPRIT], number=CULPRIT, examples=33))
    assert reports.models == honest.models
    for report in reports.rounds:
        refused = [c.reason for c in report.clients if c.outcome == "rejected"]
        assert [r.split(":")[0] for r in refused] == [reason] * (report.server_round in rounds)


def test_two_nodes_under_one_id_count_once_and_no_client_is_lost() -> None:
    row = next(row for row in ROWS if row.name == "average-all")  # Divides by N.
    impostor = bad(metrics(client_id=KEYS[0]))
    expected, reports = run(row, absent_once()), run(row, impostor)
    assert reports.models == expected.models
    first = ScriptedGrid(federation() | {NODES[CULPRIT]: SyntheticClient(KEYS[0], number=9)})
    strategy = row.strategy()
    strategy.start(first, initial(), num_rounds=1)
    assert len(strategy.clients) == len(NODES)


class TestBuffers:
    @pytest.mark.parametrize(("value", "reason"), [(math.nan, "non-finite"), (1e30, "too-large")])
    def test_poison_beside_the_vector(self, value: float, reason: str) -> None:
        row = ROWS[0]
        culprit = bad(record(bn_running_mean=np.full(3, value, np.float32)))
        reports = run(row, culprit)
        assert reports.models == run(row, absent_once()).models
        assert [c.reason.split(":")[0] for c in reports.rounds[1].clients if c.reason] == [reason]

    def test_a_counter_that_would_overflow(self) -> None:
        culprit = bad(record(bn_num_batches_tracked=np.array(2**63 - 1)))
        assert run(ROWS[0], culprit).models == run(ROWS[0], absent_once()).models

    def test_missing_buffers(self) -> None:
        culprit = bad(record(bn_running_mean=None))
        assert run(ROWS[0], culprit).models == run(ROWS[0], absent_once()).models

    def test_an_anchor_with_a_broken_model_beside_its_gradient(self) -> None:
        def add(content: RecordDict) -> None:
            content[keys.ARRAYS] = ArrayRecord({"nonsense": as_array(np.zeros(2))})

        row = next(row for row in ROWS if row.name == "fedamd")
        culprit = bad(add)
        honest = run(row, SyntheticClient(KEYS[CULPRIT], number=CULPRIT, examples=33))
        roles = {c.client: c.role for c in honest.rounds[1].clients}
        # An anchor's gradient is what counts: whatever lies beside it is not read.
        assert (run(row, culprit).models == honest.models) == (roles[KEYS[CULPRIT]] == "anchor")


class TestScaffold:
    def row(self) -> Row:
        return next(row for row in ROWS if row.name == "scaffold")

    @pytest.mark.parametrize(
        ("control", "reason"),
        [
            (None, "wrong-layout"),
            (np.full(4, math.nan, np.float32), "non-finite"),
            (np.full(4, 1e20, np.float32), "too-large"),
            (np.zeros(5, np.float32), "wrong-layout"),
        ],
    )
    def test_a_bad_control_variate(self, control: np.ndarray | None, reason: str) -> None:
        def change(content: RecordDict) -> None:
            if control is None:
                del content[keys.CONTROL]
            else:
                content[keys.CONTROL]["fc.bias"] = as_array(control)

        reports = run(self.row(), bad(change))
        assert reports.models == run(self.row(), absent_once()).models
        assert [c.reason.split(":")[0] for c in reports.rounds[1].clients if c.reason] == [reason]
        strategy = reports.rounds[0].strategy
        assert isinstance(strategy, Scaffold)
        assert np.isfinite(strategy.control).all()


def test_records_that_nobody_asked_for_are_not_read() -> None:
    def add(content: RecordDict) -> None:
        content["private-state"] = ArrayRecord({"momentum": as_array(np.full(3, math.nan))})
        content[keys.CONTROL] = ArrayRecord({"fc.bias": as_array(np.zeros(1))})

    for row in (ROWS[0], next(row for row in ROWS if row.name == "rerce-fed")):
        row = everyone(row)
        honest = run(row, SyntheticClient(KEYS[CULPRIT], number=CULPRIT, examples=33))
        assert run(row, bad(add)).models == honest.models


def test_an_update_beyond_the_norm_is_refused_and_leaves_nothing() -> None:
    freely, bounded, without = Reports(), Reports(), Reports()
    FedAvg().start(ScriptedGrid(federation()), initial(), num_rounds=1, callbacks=[freely])
    norms = {c.client: c.update_norm for c in freely.rounds[0].clients}
    limit = sorted(norms.values())[-2]
    largest = max(norms, key=lambda client: norms[client])
    FedAvg(max_update_norm=limit).start(
        ScriptedGrid(federation()), initial(), num_rounds=1, callbacks=[bounded]
    )
    outcomes = {c.client: (c.outcome, c.reason.partition(":")[0]) for c in bounded.rounds[0].clients}
    # Its reply was not taken, so only its node is known.
    assert outcomes.pop(NODES[KEYS.index(largest)]) == ("rejected", "norm")
    assert set(outcomes.values()) == {("ok", "")}
    others = {node: client for node, client in federation().items() if KEYS[NODES.index(node)] != largest}
    FedAvg().start(ScriptedGrid(others), initial(), num_rounds=1, callbacks=[without])
    assert bounded.models == without.models
    with pytest.raises(ConfigError, match="max_update_norm must be a positive number, got 0"):
        FedAvg(max_update_norm=0)


class TestUnknownClients:
    def test_more_clients_than_declared(self) -> None:
        # The seventh appears later: only the declared six are known by then.
        grid = ScriptedGrid(federation(), lambda r: NODES[:6] if r == 1 else NODES)
        reports, strategy = Reports(), FedAvg(num_clients=6)
        strategy.start(grid, initial(), num_rounds=2, callbacks=[reports])
        assert [c.reason.split(":")[0] for c in reports.rounds[1].clients if c.reason] == ["unknown-client"]
        assert len(strategy.clients) == 6
        without = Reports()
        grid = ScriptedGrid(federation(), lambda _: NODES[:6])
        FedAvg(num_clients=6).start(grid, initial(), num_rounds=2, callbacks=[without])
        assert reports.models == without.models

    @pytest.mark.parametrize("participation", [[0.5] * 5, {4: 0.5, 0: 0.5, 2: 0.5, 5: 0.5, KEYS[2]: 0.5}])
    def test_a_client_without_a_probability_stops_nobody(self, participation: Any) -> None:
        # A list must not take the client-id -1 for its last entry either.
        given = range(5) if isinstance(participation, list) else participation
        known = set(given) & set(KEYS)
        reports = Reports()
        strategy = UnbiasedFedAvg(participation=participation)
        strategy.start(ScriptedGrid(federation()), initial(), num_rounds=2, callbacks=[reports])
        for report in reports.rounds:
            assert {c.client for c in report.clients if c.outcome == "ok"} == known
            refused = [c.reason for c in report.clients if c.outcome == "rejected"]
            assert len(refused) == len(NODES) - len(known)
            assert all("gives no probability for client" in reason for reason in refused)

    def test_an_error_of_flowers_superlink_is_the_node_it_could_not_reach(self) -> None:
        def lost(message: Message) -> Message:
            answer = error_reply(message, "node unavailable")
            answer.metadata.__dict__["_src_node_id"] = 1  # The SuperLink's own id.
            return answer

        def order(_: int, replies: list[Message]) -> list[Message]:
            for message in replies:
                if message.has_error():
                    message.metadata.__dict__["_reply_to_message_id"] = f"request-{NODES[2]}"
            return replies

        class Stamping(ScriptedGrid):
            def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
                messages = list(messages)
                for message in messages:
                    message.metadata.__dict__["_message_id"] = f"request-{message.metadata.dst_node_id}"
                return super().send_and_receive(messages, timeout=timeout)

        grid = Stamping(federation() | {NODES[2]: lost}, order=order)
        reports = Reports()
        FedAvg().start(grid, initial(), num_rounds=1, callbacks=[reports])
        assert [(c.client, c.outcome) for c in reports.rounds[0].clients if c.outcome != "ok"] == [
            (NODES[2], "failed")
        ]


class TestMetrics:
    @pytest.mark.parametrize("value", [1e308, -1e308, math.nan, math.inf, 10**400, [1.0, 2.0]])
    def test_absurd_metrics_do_not_stop_the_round(self, value: Any) -> None:
        def change(content: RecordDict) -> None:
            metrics(train_loss=value, num_examples=2**40)(content)

        reports = run(ROWS[1], bad(change))
        assert reports.rounds[1].train_metrics["participants"] == len(NODES)
        assert reports.rounds[1].train_metrics["train-loss"] == pytest.approx(1 / 2)

    def test_two_enormous_losses(self) -> None:
        clients: dict[int, Client] = dict(federation())
        for i, value in ((0, 1e308), (1, 1e308), (2, -1e308)):
            clients[NODES[i]] = Culprit(KEYS[i], number=i)
            clients[NODES[i]].change = metrics(train_loss=value)  # type: ignore[attr-defined]
        reports = Reports()
        FedAvg().start(ScriptedGrid(clients), initial(), num_rounds=2, callbacks=[reports])
        assert reports.rounds[1].train_metrics["participants"] == len(NODES)

    def test_too_many_metrics(self) -> None:
        flood = metrics(**{f"m{i}": 1.0 for i in range(300)})
        reports = run(ROWS[0], bad(flood))
        assert [c.reason.split(":")[0] for c in reports.rounds[1].clients if c.reason] == ["too-many-metrics"]

    def test_a_client_cannot_overwrite_the_counts(self) -> None:
        reports = run(ROWS[0], bad(metrics(participants=999, rejected=999)))
        assert reports.rounds[1].train_metrics["participants"] == len(NODES)
        assert reports.rounds[1].train_metrics["rejected"] == 0
