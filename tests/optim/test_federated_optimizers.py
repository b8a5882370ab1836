"""Optimizers of an experiment file: on every executor, across a resume, with each way of their state."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from optimizer_experiments import CLIENTS, CODED, METHODS, experiment
from torch import nn

from turnout.client import FlatModel, TrainOptions, client_app
from turnout.client.optimizer_choice import carried_names
from turnout.client.round_optimizer import RoundOptimizer, load_arrays, state_arrays
from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.optim import CLASSP
from turnout.simulation import LocalGrid
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.strategies.carried import CarriedVectors
from turnout.strategies.rounds import Instruction
from turnout.tasks import Digits
from turnout.wire import CheckpointError, ConfigError, load_checkpoint, methods, save_checkpoint
from turnout.wire.flower import new_context, request
from turnout.wire.packing import pack

ROUNDS = 4
OTHERS = {
    "adamw kept": 'optimizer = "adamw"\nlr = 0.01\noptimizer_state = "keep"',
    "adamw sent": 'optimizer = "adamw"\nlr = 0.01\noptimizer_state = "send"',
    "sgd with momentum sent": 'optimizer = "sgd"\nmomentum = 0.9\nlr = 0.05\noptimizer_state = "send"',
    "auon kept": 'optimizer = "auon"\nlr = 0.05\noptimizer_state = "keep"',
    "frugal kept": CLIENTS["frugal"].replace('"send"', '"keep"').replace("update_gap = 4", "update_gap = 7"),
    "eco-sgd sent": 'optimizer = "eco-sgd"\nlr = 0.3\noptimizer_state = "send"',
}  # fmt: skip
EVERY = {**CLIENTS, **OTHERS, **CODED}


def made(client: str) -> Experiment:
    return Experiment.from_dict(tomllib.loads(experiment(client, ROUNDS)))


def outcome(client: str, executor: str, *, resume_at: int | None = None, folder: Path | None = None) -> Any:
    """Return the run's final vector, its accuracy and the initial model's; ``client`` may be a whole file."""
    data = tomllib.loads(client if "[run]" in client else experiment(client, ROUNDS))
    data["simulation"] = {"executor": executor, "workers": 2}
    parts = build(Experiment.from_dict(data))
    initial = parts.task.initial_arrays()

    class Keep(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            if folder is not None and report.server_round == resume_at:
                save_checkpoint(folder / "checkpoint", report.checkpoint())

    result = parts.strategy.start(parts.grid, initial, num_rounds=ROUNDS, callbacks=[Keep()])
    assert all(report.outcome == "ok" for report in parts.strategy.reports)
    accuracy = parts.task.evaluate(result.arrays)["accuracy"]
    return parts.strategy.x.copy(), accuracy, parts.task.evaluate(initial)["accuracy"]


def test_every_registered_optimizer_is_among_them() -> None:
    assert set(CLIENTS) == {entry.slug for entry in methods("optimizer")}


@pytest.mark.parametrize("name", [*EVERY, *METHODS])
def test_every_executor_trains_the_same_model(name: str) -> None:
    chosen = {**EVERY, **METHODS}[name]
    expected, accuracy, before = outcome(chosen, "serial")
    assert accuracy > before + 0.1
    for executor in ("threads", "processes", "batched"):
        vector, _, _ = outcome(chosen, executor)
        assert np.array_equal(vector, expected), executor


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    expected, _, _ = outcome(EVERY[name], "serial", resume_at=2, folder=tmp_path)
    parts = build(made(EVERY[name]))
    tree = load_checkpoint(tmp_path / "checkpoint")
    parts.strategy.start(parts.grid, parts.task.initial_arrays(), num_rounds=ROUNDS, resume_from=tree)
    assert np.array_equal(parts.strategy.x, expected)


def test_policies_make_a_difference() -> None:
    base = 'optimizer = "adamw"\nlr = 0.01\n'
    vectors = [outcome(f'{base}optimizer_state = "{p}"', "serial")[0] for p in ("reset", "keep", "send")]
    assert not np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[1], vectors[2])
    assert not np.array_equal(vectors[0], vectors[2])


def test_reset_is_the_default_and_keeps_nothing() -> None:
    parts = build(made(CLIENTS["hybrid-auon"]))
    parts.strategy.start(parts.grid, parts.task.initial_arrays(), num_rounds=2)
    assert parts.strategy.carried_vectors == ()
    assert parts.grid.state_dict()["clients"] == {}


@pytest.mark.parametrize("name", ["adamw sent", "sgd with momentum sent", "auon", "frugal"])
def test_one_client_alone_gets_back_what_it_sent(name: str) -> None:
    """The mean over one client is its own state: sending equals keeping, where all state is sent."""
    task = Digits(num_clients=1)
    options = tomllib.loads(EVERY[name])
    if options["optimizer"] == "auon":  # Its Adam part begins anew; without one, all of its state is sent.
        options["optimizer_options"] = {"adam_lr": 0.0}
    vectors = {}
    for policy in ("keep", "send"):
        app = client_app(task, local_steps=5, batch_size=16, **{**options, "optimizer_state": policy})
        carried = carried_names(app.trainer.options)
        strategy = FedAvg(carried_vectors=carried)
        strategy.start(LocalGrid(app, 1, executor="serial"), task.initial_arrays(), num_rounds=4)
        vectors[policy] = strategy.x.copy()
    np.testing.assert_allclose(vectors["send"], vectors["keep"], rtol=0, atol=1e-5)


# Two matrices, (8, 12) and (10, 8), of which a quarter is active; for "block" one of the two.
ACTIVE = {
    "columns": 8 * 3 + 10 * 2,
    "rows": 2 * 12 + 2 * 8,
    "randk": 24 + 20,
    "galore": 2 * 12 + 10 * 2,
    "block": 8 * 12,
}


@pytest.mark.parametrize("projector", ACTIVE)
def test_frugal_sends_the_numbers_of_its_active_part_and_no_others(projector: str) -> None:
    widths = ((12, 8), (8, 10), (10, 4))
    model = FlatModel(nn.Sequential(*(nn.Linear(n, m) for n, m in widths)))
    table = {"projector": projector, "density": 0.5 if projector == "block" else 0.25, "seed": 3}
    table |= {"galore_basis": "random"} if projector == "galore" else {"block_order": "ascending"}
    options = TrainOptions(
        optimizer="frugal", optimizer_state="send", lr=0.1, local_steps=1, optimizer_options=table
    )
    asked = RoundOptimizer(options, RecordDict(), 0, 1, 1)
    optimizer = asked.begin(model, 0.1, lambda key: None)
    model.gradient.copy_(torch.randn(model.size, generator=torch.Generator().manual_seed(0)))
    optimizer.step()
    asked.end(optimizer, model)
    others = 4 * 10 + 8 + 10 + 4  # The output layer and the biases have state throughout.
    for vector in asked.commit().values():
        record = model.layout.record(vector.numpy(), trimmed=True)
        assert pack(record)[0].size == 4 * (ACTIVE[projector] + others)
        assert np.array_equal(model.layout.flatten(record, with_buffers=False), vector.numpy())


def test_sent_state_is_compact_in_requests_and_replies() -> None:
    task, key = Digits(num_clients=1, model="mlp"), "optimizer.exp_avg"
    app = client_app(task, batch_size=16, local_steps=2, **tomllib.loads(CLIENTS["frugal"]))
    strategy, grid = FedAvg(carried_vectors=(key, f"{key}_sq")), LocalGrid(app, 1, executor="serial")
    strategy.start(grid, task.initial_arrays(), num_rounds=1)
    (asked,) = strategy.configure_train(2, strategy.arrays(), ConfigRecord(), grid)
    context = new_context(node_id=0, node_config={"partition-id": 0})
    for content in (asked.content, app(asked, context).content):
        dense = pack(content["arrays"])[0].size
        assert 0 < pack(content[key])[0].size < 0.4 * dense


def test_small_second_moments_survive_the_mean() -> None:
    """Rounded to zero beside a first moment that is not, they would make a step without bounds."""
    moments = np.array([1.0, 1e-12, 1e-20, 1e-30], np.float32)
    carried = CarriedVectors(("optimizer.v",), moments)
    carried.open_round({})
    for _ in range(3):
        carried.add({"optimizer.v": moments}, 7)
    carried.close_round()
    np.testing.assert_allclose(carried.means["optimizer.v"][:2], moments[:2], rtol=1e-4)


def test_a_server_told_of_it_broadcasts_the_mean_by_examples() -> None:
    like = np.zeros(3, np.float32)
    carried = CarriedVectors(("optimizer.m",), like)
    asked = carried.open_round(dict.fromkeys((0, 1), Instruction()))
    assert asked[0] is asked[1]
    assert asked[0].vectors == {}
    assert asked[0].extras == ("optimizer.m",)
    carried.add({"optimizer.m": np.array([1, 2, 3], np.float32)}, 10)
    carried.add({"optimizer.m": np.array([3, 2, 1], np.float32)}, 30)
    carried.close_round()
    carried.open_round({})
    carried.close_round()  # Nobody came.
    instruction = carried.open_round({0: Instruction()})[0]
    np.testing.assert_array_equal(instruction.vectors["optimizer.m"], [2.5, 2.0, 1.5])
    assert instruction.config == {"carried-rounds": 1}
    assert carried.nbytes == 12
    other = CarriedVectors(("optimizer.m",), like)
    other.load_state_dict(carried.state_dict())
    np.testing.assert_array_equal(other.means["optimizer.m"], [2.5, 2.0, 1.5])
    with pytest.raises(CheckpointError, match=r"optimizer\.m"):
        CarriedVectors(("optimizer.v",), like).load_state_dict(carried.state_dict())


REFUSED = [
    ("optimizer = 'frugle'", "Did you mean 'frugal'"),
    ("optimizer = 'classp'", "memory of earlier tasks"),
    ("optimizer = 'eco-sgd'\noptimizer_options = { rounding = 'rtn' }", "most small updates vanish"),
    ("optimizer = 'adamw'\noptimizer_state = 'sent'", "should be 'reset', 'keep' or 'send'"),
    ("optimizer = 'sgd'\noptimizer_state = 'keep'", "has no state"),
    ("optimizer = 'sgd'\noptimizer_options = { nesterov = true }", "leave optimizer_options out"),
    ("optimizer = 'nadam'\noptimizer_state = 'send'", "not made of averages"),
    ("optimizer = 'frugal'\noptimizer_options = { densty = 0.1 }", "Did you mean 'density'"),
    ("optimizer = 'frugal'\noptimizer_options = { density = 'much' }", "density='much'"),
    ("optimizer = 'frugal'\noptimizer_options = { lr = 0.1 }", "unknown optimizer_options key"),
    ("optimizer = 'adamw'\noptimizer_options = { betas = [0.9] }", "refuses them"),
    ("optimizer = 'adamw'\nweight_decay = 0.1\noptimizer_options = { weight_decay = 0.1 }", "given twice"),
    ("optimizer = 'classp'\nmomentum = 0.9\noptimizer_state = 'keep'", "has no momentum"),
    ("optimizer = 'adamw'\noptimizer_options = 3", "client.optimizer_options"),
    (
        "optimizer = 'frugal'\noptimizer_state = 'send'\noptimizer_options = { projector = 'galore' }",
        "each client's basis is its own",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("client", "words"), REFUSED)
def test_impossible_choices_are_refused(client: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(client)


def test_windows_that_clients_do_not_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="set local_steps"):
        TrainOptions(optimizer="frugal", optimizer_state="send", local_epochs=1)


WARNED = [
    ({"optimizer": "auon", "optimizer_state": "keep", "local_steps": 5}, "stale weights"),
    ({"optimizer": "eco-adamw"}, "loses the rounding error"),
    (
        {"optimizer": "frugal", "local_steps": 5, "optimizer_options": {"update_gap": 3}},
        "cuts the last window short",
    ),
    ({"optimizer": "auon", "optimizer_state": "keep", "local_steps": 50}, None),
    ({"optimizer": "frugal", "local_steps": 6, "optimizer_options": {"update_gap": 3}}, None),
    ({"optimizer": "adamw", "optimizer_state": "keep"}, None),
]


@pytest.mark.parametrize(("options", "words"), WARNED)
def test_doubtful_choices_are_warned_of(
    options: dict[str, Any], words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "turnout.client.app"):
        client_app(Digits(num_clients=2, model="softmax"), **options)
    assert (words in caplog.text) if words else not caplog.records


def round_optimizer(records: RecordDict, server_round: int, **options: Any) -> RoundOptimizer:
    settings = TrainOptions(**{"lr": 0.1, "local_steps": 2, **options})
    return RoundOptimizer(settings, records, 0, server_round, 2)


def test_kept_state_of_another_optimizer_or_model_is_refused() -> None:
    task, records = Digits(num_clients=2), RecordDict()
    model = FlatModel(task.seeded_model(0))
    first = round_optimizer(records, 1, optimizer="adamw", optimizer_state="keep")
    optimizer = first.begin(model, 0.1, lambda key: None)
    optimizer.step()
    first.end(optimizer, model)
    assert not records, "nothing is kept before the update is done"
    first.commit()
    with pytest.raises(ConfigError, match="'adamw'"):
        round_optimizer(records, 2, optimizer="nadam", optimizer_state="keep").begin(
            model, 0.1, lambda key: None
        )
    begun = round_optimizer(records, 1, optimizer="adamw", optimizer_state="keep")
    assert not begun.begin(model, 0.1, lambda key: None).state, "round 1 starts a run"
    kept = state_arrays(optimizer)
    classp = CLASSP(model.module.parameters())
    with pytest.raises(ConfigError, match="has 4;"):
        load_arrays(classp, {f"9.{key}": value for key, value in kept.items()})


def test_negative_second_moments_from_the_network_do_no_harm() -> None:
    model = FlatModel(Digits(num_clients=2).seeded_model(0))
    model.gradient.fill_(1.0)
    options = TrainOptions(optimizer="adamw", optimizer_state="send", local_steps=2, lr=0.1)
    bad = np.full(model.size, -1.0, np.float32)
    asked = RoundOptimizer(options, RecordDict(), 0, 2, 2, ConfigRecord({"carried-rounds": 1}))
    optimizer = asked.begin(model, 0.1, lambda key: bad)
    optimizer.step()
    assert torch.isfinite(model.parameters).all()


@pytest.mark.parametrize("rounds", [0, -1, "1", 1.5])
def test_an_impossible_count_of_rounds_is_refused(rounds: Any) -> None:
    model = FlatModel(Digits(num_clients=2).seeded_model(0))
    options = TrainOptions(optimizer="adamw", optimizer_state="send", lr=0.1)
    asked = RoundOptimizer(options, RecordDict(), 0, 2, 2, ConfigRecord({"carried-rounds": rounds}))
    with pytest.raises(ConfigError, match="carried-rounds"):
        asked.begin(model, 0.1, lambda key: np.zeros(model.size, np.float32))


def test_a_failed_update_leaves_the_kept_state_alone() -> None:
    task = Digits(num_clients=1)
    app = client_app(task, optimizer="adamw", optimizer_state="keep", local_steps=1, lr=0.01)
    context = new_context(node_id=0, node_config={"partition-id": 0})
    arrays = task.initial_arrays()

    def ask(server_round: int, local_update: str) -> None:
        config = ConfigRecord({"server-round": server_round, "local-update": local_update})
        content = RecordDict({"arrays": arrays, "config": config})
        app(request(content, dst_node_id=0), context)

    ask(1, "sgd")
    kept = context.state["turnout.optimizer.arrays"]
    assert isinstance(kept, ArrayRecord)
    with pytest.raises(ConfigError, match="plain SGD"):
        ask(2, "scaffold")
    assert context.state["turnout.optimizer.arrays"] is kept


def test_an_update_without_optimizer_steps_cannot_send_state() -> None:
    task = Digits(num_clients=1)
    app = client_app(task, optimizer="adamw", optimizer_state="send", lr=0.01)
    context = new_context(node_id=0, node_config={"partition-id": 0})
    config = ConfigRecord({"server-round": 1, "local-update": "anchor"})
    content = RecordDict({"arrays": task.initial_arrays(), "config": config})
    with pytest.raises(ConfigError, match="takes no step with the optimizer"):
        app(request(content, dst_node_id=0), context)


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_replies_without_the_carried_record_are_refused(executor: str) -> None:
    task = Digits(num_clients=3)
    grid = LocalGrid(client_app(task, optimizer="adamw", lr=0.01), 3, executor=executor, workers=2)
    strategy = FedAvg(carried_vectors=("optimizer.exp_avg",))
    strategy.start(grid, task.initial_arrays(), num_rounds=1)
    assert [report.outcome for report in strategy.reports] == ["rejected"] * 3
    assert all("optimizer.exp_avg" in report.reason for report in strategy.reports)
    assert strategy.state_dict()["carried"] == {"rounds": 0, "means": {}}


def test_a_schedule_of_the_server_scales_every_rate() -> None:
    model = FlatModel(Digits(num_clients=2).seeded_model(0))
    optimizer = round_optimizer(RecordDict(), 1, optimizer="auon").begin(model, 0.05, lambda key: None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.004]
