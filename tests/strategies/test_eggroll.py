"""EGGROLL on the server: pairs from scalars in any order, what clients are sent, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from scripted_grid import Client, ScriptedGrid, failing, shuffled, silent
from strategy_table import initial

from turnout.strategies import EGGROLL, Callback, RoundReport
from turnout.strategies.update_log import UpdateLog
from turnout.wire import ConfigError, LayoutError, ParameterLayout, as_array, keys
from turnout.wire.flower import reply
from turnout.wire.perturbation import dense
from turnout.wire.replica import MOMENTS, Replica, Search
from turnout.wire.seed_log import Fitness, LogEntry, read_log

Change = Callable[[Fitness], Fitness]
NODES = (2**63 + 1, 7, 12, 3, 99)
EXAMPLES = dict(zip(NODES, (10, 1, 250, 33, 8), strict=True))
ROUNDS = 5


class LinearClient:
    """Its fitness is ``<g_k, theta>``: exact differences without a model. It follows the log by itself."""

    def __init__(self, number: int, examples: int = 1, change: Change = lambda said: said) -> None:
        self.number, self.examples, self.change = number, examples, change
        self.replica: Replica | None = None
        self.at = 1
        self.requests: list[Message] = []

    def __call__(self, message: Message) -> Message | Iterable[Message] | None:
        self.requests.append(message)
        config: Any = message.content[keys.CONFIG]
        search, now = Search.from_config(config), config[keys.SERVER_ROUND]
        layout = ParameterLayout.from_arrays(initial(buffers=False))
        source = search.source(layout)
        self.follow(message.content, search, layout, now)
        assert self.replica is not None
        first, pairs = config[keys.FIRST_PAIR], config[keys.PAIRS]
        differences = np.array([self.difference(source, search, now, first + j) for j in range(pairs)])
        signs = config.get(keys.FITNESS_SHAPING) == "sign"
        if signs:
            differences = np.sign(differences)
        said = Fitness(now, message.metadata.dst_node_id, first, differences, search.digest, signs=signs)
        metrics = MetricRecord({keys.NUM_EXAMPLES: self.examples, keys.TRAIN_LOSS: 1.0})
        return reply(
            RecordDict({keys.FITNESS: self.change(said).record(), keys.METRICS: metrics}), to=message
        )

    def gradient(self) -> np.ndarray:
        return np.random.default_rng([3, self.number]).standard_normal(25)

    def difference(self, source: Any, search: Search, now: int, pair: int) -> float:
        parts = [
            dense(d, t, source.rank) for d, t in zip(source.draw(now, pair), source.tensors, strict=True)
        ]
        return 2 * search.sigma * float(self.gradient() @ np.concatenate([p.reshape(-1) for p in parts]))

    def follow(self, content: RecordDict, search: Search, layout: ParameterLayout, now: int) -> None:
        if keys.ARRAYS in content:
            theta = np.array(layout.flatten(content[keys.ARRAYS]))
            sent = [content[name] for name in MOMENTS[: search.num_moments]]
            moments = [np.array(layout.flatten(record)) for record in sent]
            self.replica, self.at = Replica(search, search.source(layout), theta, moments), now
            return
        if self.replica is None:
            theta = np.array(layout.flatten(initial(buffers=False)))
            self.replica = Replica.begin(search, search.source(layout), theta)
        for entry in read_log(content[keys.SEED_LOG]):
            if entry.server_round == self.at:
                self.replica = self.replica.moved(self.at, entry.weights)
                self.at += 1
        assert self.at == now


def clients(**options: Any) -> dict[int, Client]:
    return {node: LinearClient(i, EXAMPLES[node], **options) for i, node in enumerate(NODES)}


class Trace(Callback):
    def __init__(self) -> None:
        self.models: list[bytes] = []
        self.reports: list[RoundReport] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.models.append(report.strategy.x.tobytes())
        self.reports.append(report)


def run(
    strategy: EGGROLL, members: dict[int, Client] | None = None, rounds: int = ROUNDS, **options: Any
) -> Trace:
    trace = Trace()
    resume = options.pop("resume_from", None)
    grid = ScriptedGrid(clients() if members is None else members, **options)
    strategy.start(grid, initial(buffers=False), num_rounds=rounds, callbacks=[trace], resume_from=resume)
    return trace


def make(**options: Any) -> EGGROLL:
    return EGGROLL(**{"pairs": 3, "sigma": 0.1, "server_lr": 0.1, "seed": 5, **options})


MODES = pytest.mark.parametrize("mode", ["shared", "disjoint"])


@MODES
@pytest.mark.parametrize(
    "options", [{}, {"base": "adam", "normalise": True}, {"rank": None, "fitness_shaping": "sign"}], ids=str
)
def test_order_of_arrival_and_the_wire_do_not_matter(mode: str, options: dict[str, Any]) -> None:
    plain = run(make(mode=mode, **options))
    assert len(set(plain.models)) == ROUNDS
    for seed in (1, 2):
        assert run(make(mode=mode, **options), order=shuffled(seed)).models == plain.models
    assert run(make(mode=mode, **options), through_bytes=True, lazily=True).models == plain.models


@MODES
def test_replicas_hold_the_servers_bits(mode: str) -> None:
    members, strategy = clients(), make(mode=mode)
    trace = run(strategy, members)
    for client in members.values():
        assert isinstance(client, LinearClient)
        assert client.replica is not None
        assert client.replica.theta.tobytes() == trace.models[-2]  # It has not seen the last round's log.


@MODES
def test_the_update_is_the_sum_over_clients_and_pairs(mode: str) -> None:
    strategy, members = make(mode=mode, momentum=0.0), clients()
    strategy.adopt(initial(buffers=False))
    before = strategy.x.astype(np.float64)
    run(strategy, members, rounds=1)
    source, total = strategy.search.source(strategy.layout), np.zeros(25)
    weights = np.array([EXAMPLES[node] for node in NODES]) / sum(EXAMPLES.values())
    for position, node in enumerate(sorted(NODES)):
        k = NODES.index(node)
        for j in range(3):
            pair = j + (3 * position if mode == "disjoint" else 0)
            e = np.concatenate(
                [
                    dense(d, t, 1).reshape(-1)
                    for d, t in zip(source.draw(1, pair), source.tensors, strict=True)
                ]
            )
            total += weights[k] * (members[node].gradient() @ e) * e / 3  # type: ignore[union-attr]
    assert np.allclose(strategy.x, before + 0.1 * total, rtol=1e-4, atol=1e-6)


def test_identical_clients_give_the_same_for_any_number_of_them() -> None:
    same = [LinearClient(1, 4) for _ in range(5)]
    one = run(make(), {3: LinearClient(1, 4)})
    five = run(make(), dict(zip(NODES, same, strict=True)))
    for a, b in zip(one.models, five.models, strict=True):
        assert np.allclose(np.frombuffer(a, np.float32), np.frombuffer(b, np.float32), atol=1e-6)


def test_a_shift_of_all_fitnesses_is_nothing_and_a_factor_is_the_learning_rate() -> None:
    doubled = {
        node: LinearClient(i, EXAMPLES[node], lambda s: scaled(s, 2.0)) for i, node in enumerate(NODES)
    }
    assert run(make(), doubled, rounds=1).models == run(make(server_lr=0.2), rounds=1).models


def scaled(said: Fitness, factor: float) -> Fitness:
    differences = np.asarray(said.differences, np.float32) * np.float32(factor)
    return Fitness(said.server_round, said.client, said.first_pair, differences, said.search)


@MODES
def test_resume_equals_an_undisturbed_run(mode: str, tmp_path: Any) -> None:
    from turnout.wire import save_checkpoint

    def present(server_round: int) -> list[int]:
        return [] if server_round == 3 else list(NODES if server_round % 2 else NODES[:3])

    plain, members = run(make(mode=mode, base="adam"), available=present), clients()
    first = run(make(mode=mode, base="adam"), members, rounds=3, available=present)
    assert first.models[2] == first.models[1]  # Nobody came.
    save_checkpoint(tmp_path / "c", first.reports[-1].checkpoint())
    second = run(
        make(mode=mode, base="adam"),
        members,
        available=present,
        resume_from=tmp_path / "c",
        first_round=4,
    )
    assert first.models + second.models == plain.models


def test_a_late_joiner_gets_the_log_while_it_is_smaller_and_the_model_with_moments_after() -> None:
    members = clients()
    late: Any = members[NODES[0]]
    run(make(pairs=1), members, rounds=4, available=lambda t: NODES if t == 4 else NODES[1:])
    (message,) = late.requests
    assert keys.ARRAYS not in message.content
    assert [entry.server_round for entry in read_log(message.content[keys.SEED_LOG])] == [1, 2, 3]
    # A model and one moment of 25 numbers are 200 bytes; a round of one pair is 24.
    members = clients()
    late = members[NODES[0]]
    run(make(pairs=1), members, rounds=12, available=lambda t: NODES if t == 12 else NODES[1:])
    (message,) = late.requests
    assert keys.ARRAYS in message.content
    assert MOMENTS[0] in message.content
    assert keys.SEED_LOG not in message.content
    # Without a start that clients can build, the first request of each brings the model.
    members = clients()
    trace = run(make(known_start=False), members, rounds=2)
    asked: Any = members[NODES[0]]
    assert [keys.ARRAYS in message.content for message in asked.requests] == [True, False]
    assert [report.diagnostics["checkpoints-sent"] for report in trace.reports] == [5.0, 0.0]


def test_a_client_without_a_model_is_not_counted_and_gets_one() -> None:
    class Forgetful(LinearClient):
        def __call__(self, message: Message) -> Any:
            if message.content[keys.CONFIG][keys.SERVER_ROUND] != 2:
                return super().__call__(message)
            config: Any = message.content[keys.CONFIG]
            digest = Search.from_config(config).digest
            said = Fitness(2, message.metadata.dst_node_id, 0, np.empty(0, np.float32), digest, resync=True)
            self.replica, self.at = None, -1
            metrics = MetricRecord({keys.NUM_EXAMPLES: 1})
            self.requests.append(message)
            return reply(RecordDict({keys.FITNESS: said.record(), keys.METRICS: metrics}), to=message)

    members = {**clients(), NODES[1]: Forgetful(1, EXAMPLES[NODES[1]])}
    trace = run(make(), members, rounds=3)
    without = run(make(), rounds=3, available=lambda t: [n for n in NODES if t != 2 or n != NODES[1]])
    assert trace.models == without.models
    asked: Any = members[NODES[1]]
    assert [keys.ARRAYS in message.content for message in asked.requests] == [False, False, True]
    assert {c.outcome for r in trace.reports for c in r.clients} == {"ok"}


BAD: dict[str, tuple[Change, str]] = {
    "nan": (lambda s: scaled(s, float("nan")), "non-finite"),
    "infinite": (lambda s: scaled(s, float("inf")), "non-finite"),
    "too few": (lambda s: Fitness(s.server_round, s.client, 0, s.differences[:2], s.search), "wrong-pairs"),
    "too many": (lambda s: Fitness(s.server_round, s.client, 0, np.ones(4), s.search), "wrong-pairs"),
    "other round": (lambda s: Fitness(9, s.client, 0, s.differences, s.search), "wrong-pairs"),
    "other client": (lambda s: Fitness(s.server_round, 4, 0, s.differences, s.search), "wrong-pairs"),
    "other pairs": (lambda s: Fitness(s.server_round, s.client, 3, s.differences, s.search), "wrong-pairs"),
    "other seed": (lambda s: Fitness(s.server_round, s.client, 0, s.differences, 77), "wrong-pairs"),
    "signs": (
        lambda s: Fitness(s.server_round, s.client, 0, np.ones(3), s.search, signs=True),
        "wrong-pairs",
    ),
    "both": (lambda s: Fitness(s.server_round, s.client, 0, s.differences, s.search, True), "wrong-pairs"),
}


@pytest.mark.parametrize("kind", [*BAD, "no record", "a model", "odd arrays", "failing", "silent"])
def test_bad_replies_are_refused_and_leave_no_trace(kind: str) -> None:
    def other(content: dict[str, Any]) -> Client:
        metrics = MetricRecord({keys.NUM_EXAMPLES: 5})
        return lambda message: reply(RecordDict({**content, keys.METRICS: metrics}), to=message)

    reason = BAD[kind][1] if kind in BAD else "wrong-layout"
    bad: dict[str, Client] = {
        "no record": other({}),
        "a model": other({keys.ARRAYS: initial(buffers=False)}),
        "odd arrays": other({keys.FITNESS: ArrayRecord({"head": as_array(np.zeros(3))})}),
        "failing": failing,
        "silent": silent,
    }
    culprit = LinearClient(0, 10, BAD[kind][0]) if kind in BAD else bad[kind]
    trace = run(make(), {**clients(), NODES[0]: culprit}, rounds=2)
    assert trace.models == run(make(), rounds=2, available=lambda _: NODES[1:]).models
    (outcome,) = [c for c in trace.reports[0].clients if c.client == NODES[0]]
    if kind == "silent":
        assert outcome.outcome == "missing"
    else:
        assert (outcome.outcome, outcome.reason.partition(":")[0]) == (
            ("failed", "client-error") if kind == "failing" else ("rejected", reason)
        )


def test_differences_are_clipped_again_by_the_server() -> None:
    wild = {node: LinearClient(i, 1, lambda s: scaled(s, 1e30)) for i, node in enumerate(NODES)}
    strategy = make(clip=0.5, momentum=0.0)
    trace = run(strategy, wild, rounds=1)
    assert trace.reports[0].diagnostics["peak-difference"] == 0.5
    assert np.abs(strategy.x).max() < 100


def test_a_step_that_is_not_finite_is_no_step() -> None:
    trace = run(make(server_lr=3e38), rounds=2)
    start = ParameterLayout.from_arrays(initial(buffers=False)).flatten(initial(buffers=False)).tobytes()
    assert trace.models == [start, start]


def test_a_model_put_in_between_rounds_is_sent_to_everyone() -> None:
    members, strategy = clients(), make()
    grid = ScriptedGrid(members)
    arrays = initial(buffers=False)
    for t in (1, 2, 3):
        if t == 2:
            arrays = initial(3, buffers=False)
        messages = strategy.configure_train(t, arrays, ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(t, grid.send_and_receive(messages))  # type: ignore[assignment]
    asked: Any = members[NODES[0]]
    assert [keys.ARRAYS in message.content for message in asked.requests] == [False, True, False]
    assert not [r for r in strategy.reports if r.outcome != "ok"]


def test_the_log_keeps_no_more_than_the_model_would_take() -> None:
    log = UpdateLog(100)
    for t in range(1, 8):
        log.append(LogEntry(t, np.ones(5, np.float32), t, checksum=t if t % 2 else None))
    assert (len(log), log.nbytes) == (2, 80)
    assert log.since(5, 8) is None
    record = log.since(6, 8)
    assert record is not None
    assert log.since(6, 8) is record
    assert [e.server_round for e in read_log(record)] == [6, 7]
    assert read_log(log.since(8, 8)) == []  # type: ignore[arg-type]
    assert log.since(9, 8) is None
    other = UpdateLog(100)
    other.load_state_dict(log.state_dict())
    assert [e.checksum for e in read_log(other.since(6, 8))] == [None, 7]  # type: ignore[arg-type]


def test_bad_settings_are_named() -> None:
    for options, text in (
        ({"sigma": 0}, "sigma must be a positive number"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"mode": "both"}, "mode must be 'shared' or 'disjoint'"),
        ({"momentum": 1.0}, "momentum must be a number in"),
        ({"fitness": "-"}, "fitness must name a metric"),
        ({"clip": float("inf")}, "clip must be a positive number"),
        ({"checksum_every": 0}, "checksum_every must be"),
    ):
        with pytest.raises(ConfigError, match=text):
            make(**options)
    with pytest.raises(LayoutError, match="buffers"):
        make().adopt(initial())
