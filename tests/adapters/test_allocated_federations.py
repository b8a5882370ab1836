"""Adapters with a say of the server in whole federations: every executor, every strategy, bytes, resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from turnout.experiment import Experiment
from turnout.experiment.build import Federation, build
from turnout.strategies import StreamingStrategy
from turnout.strategies.rounds import Callback, RoundReport
from turnout.wire import ConfigError, view

ROUNDS, STEPS, CLIENTS = 6, 4, 4
ADAPTERS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 1, "tinit": 4, "tfinal": 8, "total_step": 24, "init_std": 0.2},
    "adalora-svd": {
        "name": "adalora", "init_r": 4, "target_r": 1, "tinit": 4, "tfinal": 8, "total_step": 24,
        "init_std": 0.2, "aggregation": "exact-svd",
    },
    "hut": {"r": 4},
    "hut-svd": {"name": "hut", "r": 2, "hut_form": "h3", "aggregation": "exact-svd"},
    "ist": {"base": {"name": "lora", "r": 4}, "interval": 2, "n_update_ratio": 0.5},
    "ist-local": {
        "name": "ist", "base": {"name": "lora", "r": 4}, "interval": 2, "n_update_ratio": 0.5,
        "mode": "local",
    },
    "snella": {"r": 4, "kernel_scale": 1.0, "target_sparsity": 0.5, "tfinal": 8, "total_step": 24},
    "snella-fold": {
        "name": "snella", "r": 4, "kernel_scale": 1.0, "target_sparsity": 0.5, "tfinal": 8, "total_step": 24,
        "aggregation": "exact-fold",
    },
    "tera": {},
    "tera-als": {"name": "tera", "train_modes": "all", "aggregation": "exact-als"},
    "weight-compander": {"learnable": True},
}  # fmt: skip


def federation(adapter: str, strategy: str = "fedavg", executor: str = "serial", **client: Any) -> Federation:
    options = {"name": adapter, **ADAPTERS[adapter]}
    return build(
        Experiment.from_dict(
            {
                "run": {"rounds": ROUNDS, "seed": 2},
                "task": {"name": "digits", "num_clients": CLIENTS, "alpha": 0.5},
                "peft": options,
                "client": {"local_steps": STEPS, "lr": 0.05, "batch_size": 16, **client},
                "strategy": {"name": strategy},
                "simulation": {"executor": executor, "workers": 2},
            }
        )
    )


def start(made: Federation, **told: Any) -> StreamingStrategy:
    made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=ROUNDS, **told)
    assert {report.outcome for report in made.strategy.reports} == {"ok"}
    return made.strategy


def digest(strategy: StreamingStrategy) -> str:
    sha = hashlib.sha256()
    for array in strategy.arrays().values():
        sha.update(view(array).tobytes())
    return sha.hexdigest()


@cache
def serial(adapter: str) -> str:
    return digest(start(federation(adapter)))


# The other dense averages are the server's alone.
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name not in ("hut-svd", "tera-als")])
def test_threads_give_the_same_model(adapter: str) -> None:
    assert digest(start(federation(adapter, executor="threads"))) == serial(adapter)


@pytest.mark.parametrize("adapter", ["adalora", "ist-local", "snella-fold", "weight-compander"])
def test_processes_give_the_same_model(adapter: str) -> None:
    assert digest(start(federation(adapter, executor="processes"))) == serial(adapter)


def ranks(strategy: StreamingStrategy) -> int:
    tensors = strategy.layout.split(strategy.layout.flatten(strategy.arrays()))
    return sum(int((value != 0).sum()) for name, value in tensors.items() if name.endswith("lora_E"))


class Ranks(Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.seen.append(ranks(report.strategy))


@pytest.mark.parametrize("strategy", ["fedavg", "fedstale", "fedau", "fedamd", "rerce-fed"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_strategy_runs_every_adapter(adapter: str, strategy: str) -> None:
    if (adapter, strategy) == ("snella-fold", "rerce-fed"):
        with pytest.raises(ConfigError, match="RerceFed's clients keep models of their own"):
            federation(adapter, strategy)
        return
    made, watch = federation(adapter, strategy), Ranks()
    trained = start(made, callbacks=[watch])
    started, ended = (trained.layout.flatten(a) for a in (made.task.initial_arrays(), trained.arrays()))
    assert np.isfinite(ended).all()
    assert not np.array_equal(ended, started)
    if adapter.startswith("adalora"):
        schedule = trained.allocator.schedule(2)  # type: ignore[union-attr]
        budgets = [schedule.budget(STEPS * r) for r in range(1, ROUNDS + 1)]
        assert all(seen <= budget for seen, budget in zip(watch.seen[1:], budgets[1:], strict=True))
        masks = [v for name, v in trained._buffers.values.items() if name.endswith("rank_mask")]
        assert sum(int(mask.sum()) for mask in masks) == budgets[-1] == 2


class Counted:
    """Passes messages on and counts the bytes of the model in requests, and of what clients trained."""

    def __init__(self, made: Federation) -> None:
        self.requests: list[dict[str, int]] = []
        self.replies: list[dict[str, int]] = []
        inner = made.grid.send_and_receive

        def sizes(message: Message) -> dict[str, int]:
            record = message.content["arrays"]
            assert isinstance(record, ArrayRecord)
            return {name: view(array).nbytes for name, array in record.items()}

        def counting(messages: Iterable[Message], **told: Any) -> Iterable[Message]:
            asked = list(messages)
            self.requests += map(sizes, asked)
            for reply in inner(asked, **told):
                if "arrays" in reply.content:  # Else it is an evaluation's.
                    self.replies.append(sizes(reply))
                yield reply

        made.grid.send_and_receive = counting  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("adapter", "numbers"),
    [
        # Two layers, 64 x 64 and 10 x 64: the cards' formulas, and scores and masks beside them.
        ("adalora", {4 * (4 * (64 + 64 + 1) + 4 * (64 + 10 + 1)) + 2 * (4 * 4 + 4)}),
        ("hut", {4 * (4 * (64 + 64) + 4 * (64 + 10))}),
        # One of the two layers a round, and a score and a byte of each.
        ("ist", {4 * 4 * (64 + 64) + 2 * 5, 4 * 4 * (64 + 10) + 2 * 5}),
        ("snella", {4 * (4 * (64 + 64) + 4 * (64 + 10) + 2 * 3) + 2 * (4 + 8)}),
        ("snella-fold", {4 * (4 * (64 + 64) + 4 * (64 + 10) + 2 * 3) + 2 * (4 + 8)}),
        # One mode of each layer a round, of 8, 8 | 8, 8 and 10 | 8, 8 numbers, in turn.
        ("tera", {4 * (8 + 10), 4 * (8 + 8)}),
        ("weight-compander", {4 * (64 * 64 + 64 * 10 + 64 + 10 + 4)}),
    ],
)
def test_replies_have_as_many_bytes_as_the_formula_says(adapter: str, numbers: set[int]) -> None:
    made = federation(adapter)
    counted = Counted(made)
    trained = start(made)
    sizes = {sum(reply.values()) for reply in counted.replies}
    if adapter == "adalora":  # In the last phase, what is left of the triplets.
        left = [int(v.sum()) for name, v in trained._buffers.values.items() if name.endswith("rank_mask")]
        numbers = numbers | {4 * (left[0] * (64 + 64 + 1) + left[1] * (64 + 10 + 1)) + 2 * (4 * 4 + 4)}
    assert sizes == numbers
    assert len(counted.replies) == ROUNDS * CLIENTS


@pytest.mark.parametrize("adapter", ["adalora", "adalora-svd"])
@pytest.mark.parametrize("strategy", ["fedavg", "rerce-fed"])
def test_in_the_last_phase_both_ways_have_what_is_left_of_the_triplets(
    adapter: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation(adapter, strategy)
    counted = Counted(made)
    trained = start(made)
    left = [int(v.sum()) for name, v in trained._buffers.values.items() if name.endswith("rank_mask")]
    assert sum(left) == 2
    numbers = 4 * (left[0] * (64 + 64 + 1) + left[1] * (64 + 10 + 1)) + 2 * (4 * 4 + 4)
    for messages in (counted.requests, counted.replies):
        assert {sum(message.values()) for message in messages[-CLIENTS:]} == {numbers}
        assert sum(messages[0].values()) == 4 * (4 * (64 + 64 + 1) + 4 * (64 + 10 + 1)) + 2 * (4 * 4 + 4)
    config = ConfigRecord()  # The same for those who only evaluate.
    asked = list(trained.configure_evaluate(7, trained.arrays(), config, made.grid))
    found = trained.aggregate_evaluate(7, made.grid.send_and_receive(asked))
    assert sum(counted.requests[-1].values()) == numbers
    monkeypatch.setattr("turnout.strategies.streaming.narrowed", lambda record, kept: record)
    whole = list(trained.configure_evaluate(7, trained.arrays(), config, made.grid))
    assert found == trained.aggregate_evaluate(7, made.grid.send_and_receive(whole)) is not None


@pytest.mark.parametrize("strategy", ["fedavg", "fedamd", "scaffold"])
def test_requests_of_what_is_left_change_no_bit(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = digest(start(federation("adalora", strategy)))
    monkeypatch.setattr("turnout.strategies.streaming.narrowed", lambda record, kept: record)
    made = federation("adalora", strategy)
    counted = Counted(made) if strategy == "fedavg" else None
    assert digest(start(made)) == narrow
    assert counted is None or len({sum(request.values()) for request in counted.requests}) == 1


def test_ist_sends_one_layer_and_the_server_keeps_the_other() -> None:
    made = federation("ist")
    counted = Counted(made)
    before = made.task.initial_arrays()
    strategy = made.strategy
    strategy.start(made.grid, before, num_rounds=1)
    (names,) = {tuple(name for name in reply if "lora" in name) for reply in counted.replies}
    assert len({name.partition(".")[0] for name in names}) == 1
    after = strategy.arrays()
    for name in before:
        if "lora" in name:
            assert np.array_equal(view(before[name]), view(after[name])) is (name not in names), name


@pytest.mark.parametrize("adapter", ["adalora", "adalora-svd", "ist", "snella", "snella-fold", "tera-als"])
def test_a_resumed_run_ends_with_the_same_model(adapter: str) -> None:
    class Keep(Callback):
        tree: dict[str, Any]

        def on_round_end(self, report: RoundReport) -> None:
            if report.server_round == 3:
                import copy

                self.tree = copy.deepcopy(report.checkpoint())

    keep = Keep()
    whole = digest(start(federation(adapter), callbacks=[keep]))
    assert digest(start(federation(adapter), resume_from=keep.tree)) == whole


def test_a_hostile_mask_is_not_looked_at() -> None:
    made = federation("adalora")
    inner = made.grid.send_and_receive

    def forging(messages: Iterable[Message], **told: Any) -> Iterable[Message]:
        for reply in inner(messages, **told):
            record = reply.content["arrays"]
            assert isinstance(record, ArrayRecord)
            for name in record:
                if name.endswith("rank_mask"):
                    view(record[name]).setflags(write=True)
                    view(record[name])[...] = 255
            yield reply

    made.grid.send_and_receive = forging  # type: ignore[method-assign,assignment]
    trained = start(made)
    masks = [v for name, v in trained._buffers.values.items() if name.endswith("rank_mask")]
    assert sorted(np.concatenate(masks).tolist()) == [0] * 6 + [1] * 2


@pytest.mark.parametrize("adapter", ["adalora", "snella"])
def test_a_schedule_in_steps_needs_local_steps(adapter: str) -> None:
    with pytest.raises(ConfigError, match=r"client\.local_steps is not set"):
        federation(adapter, local_steps="none", local_epochs=1)


def test_a_noisy_link_and_partial_replies_go_together() -> None:
    made = build(
        Experiment.from_dict(
            {
                "run": {"rounds": ROUNDS, "seed": 2},
                "task": {"name": "digits", "num_clients": CLIENTS, "alpha": 0.5},
                "peft": {"name": "tera"},
                "client": {"local_steps": 1, "lr": 1e-30},  # No step is large enough to change a number.
                "link": {"name": "noisy", "sigma_up": 0.01},
            }
        )
    )
    counted = Counted(made)
    trained = start(made)
    assert 1 in {len(reply) for reply in counted.replies}
    assert np.isfinite(trained.x).all()
