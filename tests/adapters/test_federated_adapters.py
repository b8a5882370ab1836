"""Federations of adapters: what crosses the wire, every executor, and what the server hands out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from adapter_rows import ROWS, SIDES, Row, ids
from flwr.app import ArrayRecord, Message, RecordDict
from torch import nn

from turnout.client import FlatModel, client_app
from turnout.experiment import Experiment
from turnout.experiment.adapters import couple
from turnout.experiment.build import build
from turnout.peft import Adapted, AdaptedTask, LiftConfig, LoraConfig
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg
from turnout.tasks import Digits
from turnout.tasks.travelling import place
from turnout.wire import ConfigError, keys, view

every_row = pytest.mark.parametrize("row", ROWS, ids=ids)


class Narrow(Digits):
    """Digits with a layer of the sides that the rows are written for."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, SIDES[1]), nn.ReLU(), nn.Linear(*reversed(SIDES)))


def experiment(row: Row, **more: Any) -> Experiment:
    peft = {"name": row.slug, "target_modules": ["1"], **row.options, **more.pop("peft", {})}
    return Experiment.from_dict(
        {
            "run": {"seed": 2},
            "task": {"name": "digits", "num_clients": 3},
            "peft": peft,
            "client": {"lr": 0.1, "local_steps": 3},
            **more,
        }
    )


# What is plain, what the server fixes once, and what it decides between rounds.
ENGINES = {row.slug: row for row in reversed(ROWS) if row.slug in ("lora", "lift", "adalora", "ist")}


@pytest.mark.parametrize("row", ENGINES.values(), ids=ids)
def test_executors_agree(row: Row) -> None:
    models = []
    for executor in ("serial", "processes", "threads")[: 3 if row.slug == "lift" else 2]:
        task = AdaptedTask(Narrow(num_clients=3, seed=2), replace(row.config, target_modules=("3",)))
        grid = LocalGrid(client_app(task, lr=0.1, local_steps=3), 3, executor=executor, workers=2)
        strategy = FedAvg()
        couple(strategy, task.config, lambda task=task: task, 3)
        result = strategy.start(grid, task.initial_arrays(), num_rounds=2)
        assert all(report.outcome == "ok" for report in strategy.reports)
        models.append({name: view(array) for name, array in result.arrays.items()})
    for other in models[1:]:
        for name, array in models[0].items():
            np.testing.assert_array_equal(array, other[name])


def test_the_base_is_one_copy_per_process() -> None:
    task = AdaptedTask(Digits(num_clients=2), LoraConfig(r=2))
    models = [FlatModel(task.seeded_model(seed)) for seed in (0, 1)]
    weights = [Adapted.of(m.module).layers["1"].base_weight for m in models]
    assert weights[0] is weights[1]
    moved = [place(task.model(), "meta") for _ in range(2)]
    bases = [Adapted.of(m).layers["1"].base_weight for m in moved]
    assert bases[0] is bases[1]
    assert weights[0].device.type == "cpu"
    assert models[0].size == 2 * (64 + 64) + 2 * (64 + 10)


def test_the_base_follows_from_the_tasks_seed_only() -> None:
    first, second = (AdaptedTask(Digits(num_clients=2, seed=5), LoraConfig(r=2, seed=s)) for s in (0, 1))
    a, b = (Adapted.of(task.seeded_model(9)).layers["1"] for task in (first, second))
    assert torch.equal(a.base_weight, b.base_weight)
    assert not torch.equal(a.lora_A, b.lora_A)  # type: ignore[arg-type]
    assert torch.equal(a.base_weight, Digits(num_clients=2, seed=5).seeded_model(5)[1].weight)  # type: ignore[index,arg-type]


class Wire:
    """A grid that hands messages on one by one, as a network does, and looks at them."""

    def __init__(self, grid: LocalGrid) -> None:
        self.grid = grid
        self.with_state: list[list[int]] = []

    def get_node_ids(self) -> list[int]:
        return list(self.grid.get_node_ids())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        self.with_state.append([m.metadata.dst_node_id for m in messages if keys.SHARED in m.content])
        return list(self.grid.send_and_receive(messages, timeout=timeout))


def lift_federation(**options: Any) -> tuple[Any, Wire]:
    row = Row("lift", {"r": 2, "filter_rank": 4}, lambda o, i: 0, exact=True)
    made = build(experiment(row, peft=options, simulation={"executor": "serial"}))
    return made, Wire(made.grid)


def test_shared_state_is_sent_once_to_each_client_and_again_when_it_changes() -> None:
    made, wire = lift_federation(update_interval=2)
    digests = set()

    def note(server_round: int, arrays: ArrayRecord) -> None:
        digests.add(made.strategy.shared.digest)

    made.strategy.start(wire, made.task.initial_arrays(), num_rounds=4, evaluate_fn=note)
    assert all(report.outcome == "ok" for report in made.strategy.reports)
    assert wire.with_state == [[0, 1, 2], [], [0, 1, 2], []]
    assert len(digests) == 3


def test_a_noisy_link_leaves_the_shared_state_alone() -> None:
    row = Row("lift", {"r": 2, "filter_rank": 4, "update_interval": 1}, lambda o, i: 0, exact=True)
    made = build(experiment(row, link={"name": "noisy", "sigma_down": 0.01, "sigma_up": 0.01}))
    made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=2)
    assert all(report.outcome == "ok" for report in made.strategy.reports)


def test_layers_of_lift_can_be_chosen_and_picked_anew() -> None:
    base = {"name": "lift", "r": 2, "filter_rank": 4, "update_interval": 2}
    row = Row(
        "ist", {"base": base, "n_update_ratio": 0.5, "target_modules": ["1", "3"]}, lambda o, i: 0, True
    )
    made = build(experiment(row))
    digests = set()

    def note(server_round: int, arrays: ArrayRecord) -> None:
        digests.add(made.strategy.shared.digest)

    made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=4, evaluate_fn=note)
    assert all(report.outcome == "ok" for report in made.strategy.reports)
    assert len(digests) == 3


def test_what_a_refresh_changes_is_not_the_models_function() -> None:
    made, _ = lift_federation(update_interval=1)
    plain, _ = lift_federation()
    losses = []
    for federation in (made, plain):
        result = federation.strategy.start(federation.grid, federation.task.initial_arrays(), num_rounds=1)
        losses.append(federation.task.evaluate(result.arrays)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    adapted = Adapted.of(made.task.loaded_model(result.arrays))
    assert len(adapted.shared_state()["1.settled_index"]) > 0


def test_a_refreshed_run_resumes_where_it_was() -> None:
    from turnout.strategies import Callback

    trees: dict[int, Any] = {}

    class Save(Callback):
        def on_round_end(self, report: Any) -> None:
            import copy

            trees[report.server_round] = copy.deepcopy(report.checkpoint())

    made, _ = lift_federation(update_interval=2)
    result = made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=5, callbacks=[Save()])
    again, _ = lift_federation(update_interval=2)
    resumed = again.strategy.start(
        again.grid, again.task.initial_arrays(), num_rounds=5, resume_from=trees[3]
    )
    for name, array in result.arrays.items():
        np.testing.assert_array_equal(view(array), view(resumed.arrays[name]))
    assert made.task.evaluate(result.arrays) == again.task.evaluate(resumed.arrays)


def test_clients_that_start_again_have_the_state_on_their_disk_or_are_sent_it_again() -> None:
    made, wire = lift_federation()
    clients = made.grid._clients
    outcomes = []

    def restart(server_round: int, arrays: ArrayRecord) -> None:
        outcomes.append({report.outcome for report in made.strategy.reports})
        trainer = clients.client_app.trainer
        trainer.__setstate__(trainer.__getstate__())  # As a new process: nothing in memory.
        if server_round == 2:
            for node in range(3):
                clients.states.put(node, RecordDict())  # And one without its disk.

    made.strategy.start(wire, made.task.initial_arrays(), num_rounds=4, evaluate_fn=restart)
    assert outcomes == [set(), {"ok"}, {"ok"}, {"failed"}, {"ok"}]
    assert wire.with_state == [[0, 1, 2], [], [], [0, 1, 2]]


@pytest.mark.parametrize("slug", ["fedstale", "fedamd", "rerce-fed", "scaffold"])
def test_entries_cannot_change_under_a_strategy_that_remembers(slug: str) -> None:
    options: dict[str, Any] = {"participation": "estimate"} if slug == "fedstale" else {}
    row = Row("lift", {"r": 2, "update_interval": 2}, lambda o, i: 0, exact=True)
    with pytest.raises(ConfigError, match="remembers"):
        build(experiment(row, strategy={"name": slug, **options}))


def test_lift_on_the_server_equals_the_mean_of_the_dense_weights() -> None:
    task = AdaptedTask(Digits(num_clients=3, seed=1), LiftConfig(r=2, filter_rank=4, target_modules=("1",)))
    dense = []

    class Watched(LocalGrid):
        @property
        def trains_cohorts(self) -> bool:
            return False

        def send_and_receive(self, messages: Any, **more: Any) -> Any:
            for reply in super().send_and_receive(messages, **more):
                model = task.loaded_model(reply.content[keys.ARRAYS])
                dense.append(Adapted.of(model).layers["1"].effective_weight(torch.float32).detach().double())
                yield reply

    grid = Watched(client_app(task, lr=0.1, local_steps=4), 3)
    result = FedAvg(weighting="uniform").start(grid, task.initial_arrays(), num_rounds=1)
    after = Adapted.of(task.loaded_model(result.arrays)).layers["1"].effective_weight(torch.float32)
    torch.testing.assert_close(after.detach().double(), sum(dense) / 3, atol=1e-7, rtol=0)  # type: ignore[arg-type]


def test_the_section_is_checked_like_any_other() -> None:
    row = Row("lora", {}, lambda o, i: 0, exact=False)
    for peft, message in (
        ({"name": "lorra"}, "Did you mean 'lora'"),
        ({"rr": 3}, "unknown key"),
        ({"r": "four"}, "peft.r"),
        ({"r": 0}, "r=0"),
        ({"target_modules": ["9"]}, "target_modules '9'"),
        ({"aggregation": "exact"}, "aggregation"),
        ({"base_dtype": "bf16"}, "Did you mean 'bfloat16'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(experiment(row, peft=peft))
    assert experiment(row).resolved()["peft"]["name"] == "lora"


def test_frozen_norms_of_a_base_do_not_follow_the_data() -> None:
    class Normed(Digits):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    task = AdaptedTask(Normed(num_clients=2), LoraConfig(r=2, modules_to_save=("3",)))
    model = FlatModel(task.model())
    assert not model.buffers
    model.train(True)
    model.module(task.client_data(0).x[:16])
    norm = model.module[2]  # type: ignore[index]
    assert torch.equal(norm.running_mean, torch.zeros(8))  # type: ignore[arg-type]
