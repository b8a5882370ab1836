from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.simulation import Bernoulli, LocalGrid, Tally, Trace
from turnout.wire import ConfigError
from turnout.wire.flower import NodeInfo, local_run, reply

Ask = Callable[..., list[Message]]
MakeApp = Callable[..., ClientApp]
EXECUTORS = [("serial", None), ("threads", 1), ("threads", 3), ("processes", 2)]


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), to=message)

    return app


def nodes_of(replies: Any) -> list[int]:
    return [r.metadata.src_node_id for r in replies]


# Nodes, rounds and identity.


def test_ids_are_partitions_and_available_ones_follow_the_mask(make_app: MakeApp) -> None:
    seen: dict[int, dict[str, Any]] = {}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen[context.node_id] = {**context.node_config, **context.run_config}
        return reply(RecordDict(), to=message)

    model = Bernoulli([0.5] * 8, seed=1)
    grid = LocalGrid(app, 8, participation=model, seed=5, run_config={"lr": 0.1})
    assert grid.registered_ids() == range(8)
    for server_round in (4, 2, 9):
        grid.start_round(server_round)
        assert grid.get_node_ids() == np.flatnonzero(model.mask(server_round)).tolist()
        assert list(grid.get_nodes()) == [NodeInfo(node_id=node) for node in grid.get_node_ids()]
    present = grid.get_node_ids()
    list(grid.send_and_receive(grid.create_message(RecordDict(), "train", n, "") for n in present))
    assert seen == {n: {"partition-id": n, "num-partitions": 8, "seed": 5, "lr": 0.1} for n in present}


@pytest.mark.parametrize(("executor", "workers"), EXECUTORS)
def test_messages_are_numbered_grouped_and_answered(
    executor: str, workers: int | None, make_app: MakeApp, ask: Ask
) -> None:
    grid = LocalGrid(make_app(), 5, executor=executor, workers=workers)
    grid.start_round(7)
    messages = ask(range(5))
    messages[3].metadata.group_id = "mine"
    replies = list(grid.send_and_receive(messages))
    ids = [m.metadata.message_id for m in messages]
    assert all(ids)
    assert len(set(ids)) == 5
    assert [m.metadata.group_id for m in messages] == ["7", "7", "7", "mine", "7"]
    by_node = {r.metadata.src_node_id: r.metadata for r in replies}
    assert sorted(by_node) == list(range(5))
    for message in messages:
        metadata = by_node[message.metadata.dst_node_id]
        assert metadata.reply_to_message_id == message.metadata.message_id
        assert metadata.group_id == message.metadata.group_id
        assert metadata.message_id == f"{message.metadata.message_id}-reply"
        assert metadata.dst_node_id == message.metadata.src_node_id


@pytest.mark.parametrize("node", [5, -1, 2**63])
def test_unknown_node_is_named_before_any_client_runs(node: int, make_app: MakeApp, ask: Ask) -> None:
    ran: list[int] = []
    grid = LocalGrid(make_app(lambda client, message: ran.append(client)), 5)
    with pytest.raises(ConfigError, match=rf"node id {node} is not registered; this grid has clients 0 to 4"):
        grid.send_and_receive(ask([0, node]))
    assert ran == []


def test_training_an_absent_client_gives_an_error_reply(make_app: MakeApp, ask: Ask) -> None:
    grid = LocalGrid(make_app(), 3, participation=Trace([[1, 0, 1]]))
    replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(ask(range(3)))}
    assert replies[1].error.reason == "client 1 does not take part in round 1; ask those available."
    assert replies[1].metadata.reply_to_message_id
    assert [replies[n].has_error() for n in (0, 2)] == [False, False]
    assert grid.tally == Tally(failed=0, late=0, absent=1)
    # Participation is about training: every registered client can be evaluated.
    assert len(list(grid.send_and_receive(ask(range(3), message_type="evaluate")))) == 3


def test_push_and_pull(make_app: MakeApp, ask: Ask) -> None:
    grid = LocalGrid(make_app(), 4)
    ids = list(grid.push_messages(ask(range(4))))
    first = list(grid.pull_messages(ids[2:]))
    assert [r.metadata.reply_to_message_id for r in first] == ids[2:]
    assert nodes_of(grid.pull_messages(ids[:2])) == [0, 1]
    with pytest.raises(ConfigError, match=rf"message id {ids[0]!r} is not waiting"):
        grid.pull_messages(ids[:1])


def test_create_message_run_and_ttl() -> None:
    grid = LocalGrid(echo_app(), 1)
    message = grid.create_message(RecordDict(), "evaluate", 0, "g", ttl=12.5)
    assert (message.metadata.message_type, message.metadata.group_id, message.metadata.ttl) == (
        "evaluate",
        "g",
        12.5,
    )
    run = local_run()
    run.run_id = 77
    grid.set_run(run)
    assert grid.run is run


# Failing clients.


@pytest.mark.parametrize(("executor", "workers"), EXECUTORS)
def test_a_raising_client_is_reported_and_others_go_on(
    executor: str, workers: int | None, make_app: MakeApp, ask: Ask
) -> None:
    def out_of_tune(client: int, message: Message) -> None:
        if client in (2, 4):
            raise RuntimeError(f"no bow for {client}")
        if client == 5:
            sys.exit("gone home")

    grid = LocalGrid(make_app(out_of_tune), 6, executor=executor, workers=workers)
    sound = LocalGrid(make_app(), 6)
    for server_round in (1, 2):
        replies = {
            r.metadata.src_node_id: r for r in grid.send_and_receive(ask(range(6), None, server_round))
        }
        expected = {
            r.metadata.src_node_id: r for r in sound.send_and_receive(ask(range(6), None, server_round))
        }
        assert [replies[n].has_error() for n in range(6)] == [False, False, True, False, True, True]
        for client in (2, 4):
            reason = replies[client].error.reason
            assert reason.startswith(f"client {client} raised in round {server_round}:\nTraceback")
            assert reason.rstrip().endswith(f"RuntimeError: no bow for {client}")
            assert "out_of_tune" in reason
            assert "turnout/simulation" not in reason
        assert "SystemExit: gone home" in replies[5].error.reason
        for client in (0, 1, 3):
            assert replies[client].content == expected[client].content
    assert grid.tally == Tally(failed=6, late=0, absent=0)


def test_state_changed_before_raising_is_put_back(ask: Ask) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        count = context.state["n"]["count"] + 1 if "n" in context.state else 1
        if "n" in context.state:
            context.state["n"]["count"] = count
        else:
            context.state["n"] = MetricRecord({"count": count})
        if count == 2 and message.content["config"]["server-round"] == 2:
            context.state["junk"] = MetricRecord({"half": 1})
            raise ValueError("half-way")
        return reply(RecordDict({"metrics": MetricRecord({"count": count})}), to=message)

    grid = LocalGrid(app, 1)
    counts = []
    for server_round in (1, 2, 3):
        (answer,) = grid.send_and_receive(ask([0], None, server_round))
        counts.append(None if answer.has_error() else answer.content["metrics"]["count"])
    assert counts == [1, None, 2]
    assert [record[0] for record in grid.state_dict()["clients"]["0"]] == ["n"]


@pytest.mark.parametrize("answer", [lambda message: None, lambda message: message])
def test_an_app_that_does_not_reply_is_told_how(answer: Callable[[Message], Any], ask: Ask) -> None:
    app = ClientApp()
    app.train()(lambda message, context: answer(message))
    (error,) = LocalGrid(app, 1).send_and_receive(ask([0]))
    assert "return Message(content, reply_to=message)" in error.error.reason


def test_clients_cannot_change_each_others_request(ask: Ask) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = RecordDict({"metrics": MetricRecord({"round": message.content["config"]["server-round"]})})
        message.content["config"]["server-round"] = 99
        message.content["extra"] = MetricRecord({"a": 1})
        return reply(seen, to=message)

    messages = ask(range(3))
    replies = list(LocalGrid(app, 3).send_and_receive(messages))
    assert [r.content["metrics"]["round"] for r in replies] == [1, 1, 1]
    assert list(messages[0].content) == ["arrays", "config"]


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 0}, r"num_clients .* got 0"),
        ({"num_clients": 2.0}, r"num_clients .* got 2\.0"),
        ({"participation": Bernoulli([0.5] * 3)}, r"participation is for 3 clients but num_clients is 4"),
        (
            {"executor": "thread"},
            r"unknown executor 'thread'\. Did you mean 'threads'\? Known: ",
        ),
        ({"executor": "threads", "workers": 0}, r"workers .* at least 1.* got 0"),
        ({"workers": -2}, r"workers .* got -2"),
        ({"workers": 1.5}, r"workers .* got 1\.5"),
        ({"seed": -1}, r"seed .* got -1"),
        ({"min_available_nodes": 0}, r"min_available_nodes .* got 0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalGrid(echo_app(), **{"num_clients": 4} | settings)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_impossible_timeout(timeout: float, ask: Ask) -> None:
    with pytest.raises(ConfigError, match="timeout must be above 0 seconds"):
        LocalGrid(echo_app(), 1).send_and_receive(ask([0]), timeout=timeout)


def test_impossible_round() -> None:
    with pytest.raises(ConfigError, match="server_round is 0"):
        LocalGrid(echo_app(), 1).start_round(0)


# Cost.


def test_100_000_registered_clients_cost_no_pass_over_them(ask: Ask) -> None:
    grid = LocalGrid(echo_app(), 100_000, participation=Bernoulli([1e-4] * 100_000, seed=0))
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    seconds = []
    for server_round in range(1, 21):
        began = time.perf_counter()
        grid.start_round(server_round)
        messages = [grid.create_message(content, "train", node, "") for node in grid.get_node_ids()]
        assert 0 < len(list(grid.send_and_receive(messages))) == len(messages) < 50
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005
