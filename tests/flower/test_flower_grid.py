"""`FlowerGrid` over a grid that behaves as SuperLink's: ids, drop-outs, one reply at a time, client state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from node_grid import NodeGrid

from turnout.client import at_home
from turnout.server.flower import CommitCallback, FlowerGrid
from turnout.simulation import Bernoulli, LocalGrid
from turnout.strategies import Callback, FedStale, RoundReport
from turnout.wire import ConfigError, as_array, view

N = 6


def app(*, fail: int = -1, stateful: bool = True) -> ClientApp:
    """A heavy-tailed step that depends on the client, the round and how often the client took part."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if client == fail:
            raise ValueError("planned failure")
        count = float(context.state["count"]["n"]) if "count" in context.state else 0.0
        if stateful:
            context.state["count"] = MetricRecord({"n": count + 1})
        rng = np.random.default_rng([client, int(message.content["config"]["server-round"])])
        arrays = ArrayRecord()
        for name, array in message.content["arrays"].items():
            step = rng.standard_normal(array.shape).astype(np.float32) * np.float32(1 + count)
            arrays[name] = as_array(view(array) + step)
        metrics = {"num-examples": 1 + client, "client-id": client, "train-loss": 1.0}
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    return made


def initial() -> ArrayRecord:
    return ArrayRecord({"w": as_array(np.zeros(40, np.float32)), "b": as_array(np.ones(3, np.float32))})


def model(arrays: Mapping[str, Any]) -> np.ndarray:
    return np.concatenate([view(array).ravel() for array in arrays.values()])


def in_one_process(strategy: Any, rounds: int, participation: Any = None) -> np.ndarray:
    grid = LocalGrid(app(), N, participation=participation)
    return model(strategy.start(grid, initial(), num_rounds=rounds).arrays)


class Reports(Callback):
    def __init__(self) -> None:
        self.rounds: list[dict[int, str]] = []
        self.tree: dict[str, Any] = {}

    def on_round_end(self, report: RoundReport) -> None:
        self.rounds.append({client.client: client.outcome for client in report.clients})
        self.tree = report.checkpoint()


@pytest.mark.parametrize("delay", [0, 3])
def test_the_model_is_that_of_a_simulation(delay: int) -> None:
    participation = Bernoulli([0.6] * N, seed=4)
    grid = FlowerGrid(
        NodeGrid(at_home(app()), [3, 0, 5, 1, 4, 2], delay=delay),
        num_clients=N,
        participation=participation,
        longest_pause=0.01,
    )
    result = FedStale(num_clients=N).start(grid, initial(), num_rounds=5)
    np.testing.assert_array_equal(
        model(result.arrays), in_one_process(FedStale(num_clients=N), 5, participation)
    )


def test_replies_are_held_one_at_a_time() -> None:
    inner = NodeGrid(at_home(app()), range(N))
    FedStale(num_clients=N).start(FlowerGrid(inner, num_clients=N, min_clients=N), initial(), num_rounds=3)
    assert inner.most_held == 1
    plain = NodeGrid(at_home(app()), range(N))
    FedAvg(fraction_evaluate=0.0, min_available_nodes=N).start(plain, initial(), num_rounds=1)
    assert plain.most_held == N  # What Flower's own loop holds: so the count can tell.


def test_drop_outs_are_attributed_to_their_clients() -> None:
    inner = NodeGrid(at_home(app(fail=2)), range(N))
    grid, reports = FlowerGrid(inner, num_clients=N, min_clients=N), Reports()

    class Lose(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            inner.lost.add(4)

    FedStale(num_clients=N).start(grid, initial(), num_rounds=2, callbacks=[reports, Lose()], timeout=30)
    assert reports.rounds[0] == {0: "ok", 1: "ok", 2: "failed", 3: "ok", 4: "ok", 5: "ok"}
    assert reports.rounds[1] == {0: "ok", 1: "ok", 2: "failed", 3: "ok", 4: "failed", 5: "ok"}


def test_a_client_that_comes_back_as_another_node_is_the_same() -> None:
    inner = NodeGrid(at_home(app(stateful=False)), range(N))

    class Reconnect(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            inner.disconnect(3)
            inner.connect(3)

    strategy = FedStale(num_clients=N)
    strategy.start(
        FlowerGrid(inner, num_clients=N, min_clients=N), initial(), num_rounds=3, callbacks=[Reconnect()]
    )
    assert strategy.clients.registered == N
    assert {report.staleness for report in strategy.reports} == {1}


def test_late_replies_are_given_up_and_booked_as_missing() -> None:
    inner = NodeGrid(at_home(app()), range(N), delay=0)
    grid, reports = FlowerGrid(inner, num_clients=N, min_clients=N, longest_pause=0.01), Reports()
    grid.get_node_ids()
    inner._delay = 10_000
    FedStale(num_clients=N).start(grid, initial(), num_rounds=1, timeout=0.1, callbacks=[reports])
    assert set(reports.rounds[0].values()) == {"missing"}
    assert grid.late == N


def test_requests_that_superlink_does_not_take_fail_their_clients() -> None:
    inner = NodeGrid(at_home(app()), range(N))
    grid, reports = FlowerGrid(inner, num_clients=N, min_clients=N), Reports()
    grid.get_node_ids()
    inner.refusing = True
    FedStale(num_clients=N).start(grid, initial(), num_rounds=1, callbacks=[reports])
    assert set(reports.rounds[0].values()) == {"failed"}


def test_ordinary_apps_are_clients_by_their_node() -> None:
    inner = NodeGrid(app(), range(N))  # It does not know the question.
    grid = FlowerGrid(inner, min_clients=N)
    assert grid.get_node_ids() == sorted(inner.nodes)
    strategy = FedStale(num_clients=N)
    strategy.start(grid, initial(), num_rounds=2)
    assert sorted(report.client for report in strategy.reports) == list(range(N))  # As their replies say.


def test_a_node_attribute_may_name_the_client() -> None:
    inner = NodeGrid(at_home(app()), [0, 1])
    inner.configs = {0: {"client-id": 41}, 1: {"client-id": 7, "partition-id": 7}}
    assert FlowerGrid(inner, min_clients=2).get_node_ids() == [7, 41]


def test_strangers_are_left_out_and_two_nodes_of_a_client_are_one() -> None:
    inner = NodeGrid(at_home(app()), [0, 1, 9, 1])
    grid = FlowerGrid(inner, num_clients=2, min_clients=2)
    assert grid.get_node_ids() == [0, 1]
    assert grid.registered_ids() == range(2)
    newest = inner.connect(0)  # Started anew; the old node is not missed yet.
    grid.get_node_ids()
    grid.push_messages([grid.create_message(RecordDict(), "train", 0, "1")])
    assert [message.metadata.dst_node_id for message, _ in inner._waiting.values()] == [newest]


@pytest.mark.parametrize("make", [FedAvg, FedAdam])
def test_stock_strategies_run_by_themselves(make: Any) -> None:
    inner = NodeGrid(at_home(app()), [5, 1, 0, 3, 2, 4], delay=1)
    grid = FlowerGrid(inner, num_clients=N, min_clients=N, longest_pause=0.01)
    models = []
    for engine in (grid, LocalGrid(app(), N)):
        import random

        random.seed(3)
        strategy = make(fraction_evaluate=0.0, min_available_nodes=N)
        models.append(model(strategy.start(engine, initial(), num_rounds=3, timeout=30).arrays))
    np.testing.assert_array_equal(*models)


def test_client_state_outlives_node_and_server(tmp_path: Path) -> None:
    """Nodes and server are new after every round; clients go on from their files."""
    undisturbed = in_one_process(FedStale(num_clients=N), 4)
    tree: dict[str, Any] | None = None
    for rounds in range(1, 5):
        grid = FlowerGrid(
            NodeGrid(at_home(app(), tmp_path), range(N), seed=rounds), num_clients=N, min_clients=N, run="one"
        )
        reports = Reports()
        result = FedStale(num_clients=N).start(
            grid,
            initial(),
            num_rounds=rounds,
            resume_from=tree,
            callbacks=[reports, CommitCallback(grid)],
        )
        tree = reports.tree
    np.testing.assert_array_equal(model(result.arrays), undisturbed)


def test_a_round_that_is_done_again_starts_from_the_state_before_it(tmp_path: Path) -> None:
    """A server that goes back to its checkpoint, with clients that have gone on since."""
    undisturbed = in_one_process(FedStale(num_clients=N), 3)
    inner = NodeGrid(at_home(app(), tmp_path), range(N))

    class First(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            if report.server_round == 1:
                import copy

                self.tree = copy.deepcopy(report.checkpoint())

    first = First()
    for tree in (None, "first"):
        grid = FlowerGrid(inner, num_clients=N, min_clients=N, run="one")
        resume = first.tree if tree else None
        result = FedStale(num_clients=N).start(
            grid, initial(), num_rounds=3, resume_from=resume, callbacks=[first]
        )
    np.testing.assert_array_equal(model(result.arrays), undisturbed)
    assert list(tmp_path.rglob("round-*.safetensors"))


def test_a_refused_reply_does_not_count_for_the_state(tmp_path: Path) -> None:
    inner = NodeGrid(at_home(app(), tmp_path), range(N))
    grid = FlowerGrid(inner, num_clients=N, min_clients=N, run="one")
    strict = FedStale(num_clients=N, max_update_norm=1e-3)
    strict.start(grid, initial(), num_rounds=2, callbacks=[CommitCallback(grid)])
    assert {report.outcome for report in strict.reports} == {"rejected"}
    assert grid.state_dict()["accepted"] == {}


def test_impossible_settings_are_refused() -> None:
    inner = NodeGrid(at_home(app()), [])
    for wrong, said in [
        ({"min_clients": 0}, "min_clients"),
        ({"longest_pause": 0.0}, "longest_pause"),
        ({"participation": Bernoulli([0.5] * N, seed=0)}, "num_clients"),
    ]:
        with pytest.raises(ConfigError, match=said):
            FlowerGrid(inner, **wrong)  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"came within 0.1 seconds"):
        FlowerGrid(inner, wait=0.1).get_node_ids()
    assert time.monotonic() - started < 10
    grid = FlowerGrid(NodeGrid(at_home(app()), [0]), num_clients=4)
    message = grid.create_message(RecordDict(), "query.identity", 3, "1")
    with pytest.raises(ConfigError, match="client 3 was never here"):
        grid.send_and_receive([message])
    context = Context(1, 2, {"client-id": "x"}, RecordDict(), {})
    with pytest.raises(ConfigError, match="client-id='x'"):
        at_home(app())(message, context)


def test_pushed_requests_are_pulled_once() -> None:
    grid = FlowerGrid(NodeGrid(at_home(app()), range(N)), num_clients=N, min_clients=N)
    content = RecordDict({"arrays": initial()})
    from flwr.app import ConfigRecord

    content["config"] = ConfigRecord({"server-round": 1})
    ids = grid.push_messages(
        [grid.create_message(content, "train", client, "1") for client in grid.get_node_ids()]
    )
    assert [answer.metadata.src_node_id for answer in grid.pull_messages(ids)] == list(range(N))
    assert grid.pull_messages(ids) == []
