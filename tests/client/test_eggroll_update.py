"""EGGROLL's clients: real forward passes, replicas that follow the server's, on every executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from torch import nn
from torch.nn.functional import cross_entropy

import turnout.optim
from turnout.client import client_app
from turnout.client.members import Members
from turnout.client.minibatches import generator, minibatches
from turnout.experiment import load_experiment
from turnout.simulation import Bernoulli, LocalGrid
from turnout.simulation.run import simulate
from turnout.strategies import EGGROLL, Callback, RoundReport
from turnout.tasks import Digits
from turnout.wire import as_array, view

N = 4


class States(Callback):
    """What clients keep, and the model, after each round."""

    def __init__(self, grid: LocalGrid) -> None:
        self.grid, self.models, self.reports = grid, list[bytes](), list[RoundReport]()

    def on_round_end(self, report: RoundReport) -> None:
        self.models.append(report.strategy.x.tobytes())
        self.reports.append(report)

    def state(self, client: int) -> RecordDict:
        return self.grid._clients.states.get(client)

    def outcomes(self) -> set[str]:
        return {c.outcome for report in self.reports for c in report.clients}


def task(**options: Any) -> Digits:
    return Digits(**{"num_clients": N, "alpha": 0.3, "seed": 2, "min_examples": 5, **options})


def run(
    strategy: EGGROLL,
    of: Digits | None = None,
    *,
    rounds: int = 4,
    start: ArrayRecord | None = None,
    batch_size: int = 16,
    **grid: Any,
) -> States:
    data = of or task()
    local = LocalGrid(client_app(data, batch_size=batch_size), data.num_clients, **grid)
    states = States(local)
    begin = start or data.initial_arrays()
    strategy.start(local, begin, num_rounds=rounds, callbacks=[states])
    return states


def make(**options: Any) -> EGGROLL:
    return EGGROLL(**{"pairs": 3, "sigma": 0.05, "seed": 9, "checksum_every": 2, **options})


@pytest.mark.parametrize("mode", ["shared", "disjoint"])
def test_clients_that_come_and_go_give_the_same_bits_on_every_executor(mode: str) -> None:
    participation = Bernoulli([0.4, 0.9, 0.6, 0.5], seed=3)
    plain = run(make(mode=mode), participation=participation, rounds=6)
    assert plain.outcomes() == {"ok"}
    # Replays of several rounds happened, and nobody needed the model.
    assert all(report.diagnostics["checkpoints-sent"] == 0 for report in plain.reports)
    for executor in ("threads", "processes", "batched"):
        other = run(make(mode=mode), participation=participation, rounds=6, executor=executor, workers=2)
        assert other.models == plain.models, executor


@pytest.mark.parametrize("rounds", [1, 4])
def test_replicas_are_the_servers_model_to_the_bit(rounds: int) -> None:
    states = run(make(base="adam", weight_decay=0.1), rounds=rounds)
    begun = states.reports[0].strategy.layout.flatten(task().initial_arrays()).tobytes()
    for client in range(N):
        kept = states.state(client)["turnout.eggroll.vectors"]
        assert view(kept["theta"]).tobytes() == [begun, *states.models][-2]
    # One process works out a round once and all its clients share the result.
    shared = {view(states.state(c)["turnout.eggroll.vectors"]["theta"]).ctypes.data for c in range(N)}
    assert len(shared) == 1


class OneByOne(Digits):
    """Digits whose model is none of those that many members can be had of at a time."""

    def model(self) -> nn.Module:
        return nn.Sequential(super().model(), nn.Identity())


def many_at_a_time(model: nn.Module, strategy: EGGROLL, t: int, x: Any, y: Any) -> np.ndarray:
    """Return the differences of the pairs of round ``t`` as a client has them of a perceptron."""
    source = strategy.search.source(strategy.layout)
    found = Members.of(model, source, x)
    assert found is not None
    draws = [source.draw(t, pair) for pair in range(strategy.pairs)]
    outputs = torch.cat(list(found.outputs(x, draws, strategy.sigma))).flatten(0, 2)
    losses = cross_entropy(outputs, y.repeat(2 * strategy.pairs), reduction="none")
    fitness = -losses.view(-1, len(y)).mean(dim=1).detach().numpy().astype(float)
    return (fitness[::2] - fitness[1::2]).astype(np.float32)


@pytest.mark.parametrize(("of", "base"), [(OneByOne, "sgd"), (OneByOne, "adam"), (Digits, "sgd")])
def test_one_client_is_centralised_eggroll_to_the_bit(of: type[Digits], base: Any) -> None:
    data = of(num_clients=1, alpha=0.3, seed=2)
    options = {"pairs": 4, "sigma": 0.05, "seed": 9, "momentum": 0.9, "base": base}
    strategy = EGGROLL(mode="disjoint", server_lr=0.02, noise="gaussian", **options)
    states = run(strategy, data, rounds=3)
    model = data.seeded_model(data.seed)
    optimizer = turnout.optim.EGGROLL(model.named_parameters(), lr=0.02, **options)
    for t in (1, 2, 3):
        x, y = next(
            minibatches(
                data.client_data(0), lambda t=t: generator(0, 0, t), batch_size=16, steps=None, epochs=1
            )
        )
        if of is OneByOne:
            optimizer.step(lambda x=x, y=y: -data.loss(model(x), y))
        else:
            found = many_at_a_time(model, strategy, t, x, y)
            optimizer.apply_pairs(range(4), found / (2.0 * 4 * 0.05))
        mine = np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])
        assert mine.tobytes() == states.models[t - 1]


def test_signs_are_all_that_is_sent() -> None:
    data = Digits(partition="iid", num_clients=2, seed=2)
    strategy = make(fitness_shaping="sign", pairs=16, sigma=0.02, server_lr=0.002)
    before = data.evaluate(data.initial_arrays())["loss"]
    states = run(strategy, data, rounds=12, batch_size=64)
    assert states.outcomes() == {"ok"}
    assert states.reports[-1].diagnostics["rms-difference"] == 1.0
    assert data.evaluate(strategy.arrays())["loss"] < 0.9 * before


def test_a_metric_without_gradient_is_raised() -> None:
    data = Digits(partition="iid", num_clients=2, seed=2)
    strategy = make(fitness="accuracy", pairs=16, sigma=0.1, server_lr=0.2)
    before = data.evaluate(data.initial_arrays())["accuracy"]
    states = run(strategy, data, rounds=25, batch_size=64)
    assert data.evaluate(strategy.arrays())["accuracy"] > before + 0.1
    assert all(np.isfinite(c.train_loss) for c in states.reports[-1].clients)
    wrong = run(make(fitness="f1"), rounds=1)
    assert wrong.outcomes() == {"failed"}
    assert "unknown fitness: metric of task 'digits' 'f1'" in wrong.reports[0].clients[0].reason


def corrupt(states: States) -> None:
    record: Any = states.state(1)["turnout.eggroll.vectors"]
    theta = np.array(view(record["theta"]))
    theta[7] += 1e-3
    record["theta"] = as_array(theta)


def forget(states: States) -> None:
    states.state(1).clear()


@pytest.mark.parametrize("harm", [corrupt, forget])
def test_a_replica_that_differs_or_is_lost_is_noticed_and_replaced(harm: Any) -> None:
    strategy = make()

    class Harm(States):
        def on_round_end(self, report: RoundReport) -> None:
            super().on_round_end(report)
            if report.server_round == 2:
                harm(self)

    data = task()
    grid = LocalGrid(client_app(data, batch_size=16), N)
    states = Harm(grid)
    strategy.start(grid, data.initial_arrays(), num_rounds=4, callbacks=[states])
    assert states.outcomes() == {"ok"}
    # Round 2 ends with a checksum, which round 3 brings: client 1 says that it differs and has no weight.
    weights = [{c.client: c.weight for c in r.clients} for r in states.reports]
    assert weights[1][1] > 0.0
    assert weights[2][1] == 0.0
    assert weights[3][1] > 0.0
    assert [r.diagnostics["checkpoints-sent"] for r in states.reports] == [0.0, 0.0, 0.0, 1.0]
    kept = states.state(1)["turnout.eggroll.vectors"]
    assert view(kept["theta"]).tobytes() == states.models[-2]


def test_a_start_that_clients_do_not_know_is_sent() -> None:
    data = task()
    start = data.initial_arrays()
    for name in list(start):
        start[name] = as_array(view(start[name]) * np.float32(0.5))
    states = run(make(), data, start=start)
    assert [r.diagnostics["checkpoints-sent"] for r in states.reports] == [0.0, N, 0.0, 0.0]
    assert states.models[0] == states.reports[0].strategy.layout.flatten(start).tobytes()
    told = run(make(known_start=False), data, start=start, rounds=2)
    assert [r.diagnostics["checkpoints-sent"] for r in told.reports] == [N, 0.0]
    assert len(set(told.models)) == 2


EXPERIMENT = """
[run]
name = "seeds"
rounds = 4
[task]
name = "digits"
num_clients = 5
partition = "iid"
[strategy]
name = "eggroll"
mode = "disjoint"
pairs = 2
rank = 2
[participation]
model = "bernoulli"
probabilities = 0.6
"""


def test_the_experiment_file_names_it_and_a_run_resumes(tmp_path: Path) -> None:
    file = tmp_path / "seeds.toml"
    file.write_text(EXPERIMENT)

    def go(name: str, *overrides: str, **options: Any) -> Any:
        place = f"run.directory={tmp_path / name}"
        return simulate(load_experiment(file, [place, *overrides]), plots=False, **options)

    whole = go("whole")
    assert go("processes", "simulation.executor=processes").model_sha256 == whole.model_sha256
    part = go("part", "run.rounds=2")
    again = go("part", resume=part.run_id)
    assert again.model_sha256 == whole.model_sha256


def test_frozen_vectors_and_full_rank_move_as_said() -> None:
    strategy = make(freeze_1d=True, rank=None)
    data = task()
    before = data.initial_arrays()
    run(strategy, data, rounds=2)
    after = strategy.arrays()
    same = {name: np.array_equal(view(after[name]), view(before[name])) for name in after}
    assert same == {name: name.endswith("bias") for name in after}
    assert torch.is_grad_enabled()
