"""BO-REP's invariants (arXiv 2401.09587), alone and federated."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from optimizer_table import pickled
from torch import Tensor

from turnout.client import client_app
from turnout.client.state import ClientState
from turnout.optim import BORep, hypergradient
from turnout.optim.bilevel import joint_norm
from turnout.simulation import LocalGrid
from turnout.strategies import BORep as ServerBORep
from turnout.strategies import BORepLocalUpper
from turnout.tasks import Digits, HyperCleaning, HyperRepresentation
from turnout.wire import ConfigError, ParameterLayout, keys
from turnout.wire.flower import new_context, request

D = 4


class Quadratic:
    """``g = 1/2 ||y - B x||^2`` and any f, without noise, in float64."""

    def __init__(self, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.B = torch.randn(D, D, generator=rng, dtype=torch.float64)
        self.x = torch.randn(D, generator=rng, dtype=torch.float64).requires_grad_()
        self.y = torch.zeros(D, dtype=torch.float64).requires_grad_()
        self.scale = 1.0

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.25 * y.square().sum() ** 2 + (x * y).sum() + x.cos().sum()

    def upper(self) -> Tensor:
        return self.scale * self.f(self.x, self.y)

    def lower(self) -> Tensor:
        return 0.5 * (self.y - self.B @ self.x).square().sum()

    def trainer(self, **options: Any) -> BORep:
        groups = [{"params": [self.x], "role": "upper"}, {"params": [self.y], "role": "lower"}]
        return BORep(groups, **{"lr": 0.03, "lower_lr": 0.2, "nu": 0.2, **options})


def test_each_step_has_the_length_eta() -> None:
    problem = Quadratic()
    trainer = problem.trainer()
    for _ in range(20):
        before = problem.x.detach().clone()
        trainer.step(problem.upper, problem.lower)
        assert float((problem.x.detach() - before).norm()) == pytest.approx(0.03, rel=1e-12)


def test_scaling_f_scales_z_and_m_and_leaves_the_path() -> None:
    one, five = Quadratic(), Quadratic()
    five.scale = 5.0
    first, second = one.trainer(eps=0.0), five.trainer(eps=0.0)
    for _ in range(15):
        first.step(one.upper, one.lower)
        second.step(five.upper, five.lower)
    assert torch.allclose(one.x, five.x, rtol=1e-12)
    assert torch.allclose(5 * first.state[one.y]["z"], second.state[five.y]["z"], rtol=1e-12)
    assert torch.allclose(5 * first.state[one.x]["exp_avg"], second.state[five.x]["exp_avg"], rtol=1e-12)


def test_the_fixed_point_is_the_true_hypergradient() -> None:
    problem = Quadratic()
    with torch.no_grad():
        problem.y.copy_(problem.B @ problem.x)
    z = [torch.zeros_like(problem.y)]
    for _ in range(60):
        found = hypergradient([problem.x], [problem.y], z, 0.5, problem.upper, problem.lower)
    (f_y,) = torch.autograd.grad(problem.upper(), [problem.y])
    assert torch.allclose(z[0], f_y, rtol=1e-10)
    assert float(joint_norm(found.implicit)) < 1e-9

    def phi(x: Tensor) -> float:
        return float(problem.f(x, problem.B @ x))

    step, x = 1e-6, problem.x.detach()
    for i in range(D):
        e = torch.zeros(D, dtype=torch.float64)
        e[i] = step
        slope = (phi(x + e) - phi(x - e)) / (2 * step)
        assert float(found.upper[0][i]) == pytest.approx(slope, rel=1e-6)


def test_without_normalisation_it_is_soba_with_momentum() -> None:
    problem = Quadratic()
    x, y = problem.x.detach().clone(), problem.y.detach().clone()
    z, m = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    trainer = problem.trainer(interval=1, inner_steps=1, normalize=False, lr=0.01)
    for _ in range(10):
        trainer.step(problem.upper, problem.lower)
        y = y - 0.2 * (y - problem.B @ x)
        f_x, f_y = y - x.sin(), y.square().sum() * y + x
        z = z - 0.2 * (z - f_y)
        m = 0.9 * m + 0.1 * (f_x + problem.B.T @ z)
        x = x - 0.01 * m
    assert torch.allclose(problem.x, x, rtol=1e-9)
    assert torch.allclose(problem.y, y, rtol=1e-9)


def test_beta_zero_is_normalised_sgd() -> None:
    problem = Quadratic()
    trainer = problem.trainer(beta=0.0)
    z = [torch.zeros_like(problem.y)]
    trainer.step(problem.upper, problem.lower)
    moved = problem.x.detach().clone()
    again = Quadratic()
    with torch.no_grad():
        again.y.copy_(problem.y)
    h = hypergradient([again.x], [again.y], z, 0.2, again.upper, again.lower).upper[0]
    assert torch.allclose(again.x - 0.03 * h / h.norm(), moved, rtol=1e-12)


def test_without_a_direction_x_stays_and_frozen_variables_have_no_say() -> None:
    problem = Quadratic()
    frozen = torch.ones(3, dtype=torch.float64)
    groups = [{"params": [problem.x, frozen], "role": "upper"}, {"params": [problem.y], "role": "lower"}]
    trainer = BORep(groups, lr=0.03, lower_lr=0.2, nu=0.2)
    before = problem.x.detach().clone()
    trainer.step(lambda: 0.0 * problem.upper(), problem.lower)
    assert torch.equal(problem.x, before)
    trainer.step(problem.upper, problem.lower)
    assert float((problem.x.detach() - before).norm()) == pytest.approx(0.03)
    assert torch.equal(frozen, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="role=None"):
        trainer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


def test_y_moves_when_due_and_z_in_each_step() -> None:
    problem = Quadratic()
    trainer = problem.trainer(interval=3)
    for t in range(9):
        y, z = problem.y.detach().clone(), trainer.state[problem.y].get("z", torch.zeros(D)).clone()
        trainer.step(problem.upper, problem.lower)
        assert torch.equal(y, problem.y) == (t % 3 != 0)
        assert not torch.equal(z, trainer.state[problem.y]["z"])


def test_without_an_upper_gradient_in_y_z_vanishes() -> None:
    problem = Quadratic()
    trainer = problem.trainer()
    trainer.step(problem.upper, problem.lower)
    start = float(trainer.state[problem.y]["z"].norm())
    assert start > 0
    for _ in range(60):
        trainer.step(lambda: problem.x.cos().sum(), problem.lower)
    assert float(trainer.state[problem.y]["z"].norm()) < 1e-5 * start
    h = -problem.x.detach().sin()
    m = trainer.state[problem.x]["exp_avg"]
    assert float(m @ h / (m.norm() * h.norm())) > 0.99


def test_a_state_dict_resumes_the_path() -> None:
    whole, first = Quadratic(), Quadratic()
    trainer, other = whole.trainer(init_steps=7), first.trainer(init_steps=7)
    for _ in range(11):
        trainer.step(whole.upper, whole.lower)
    for _ in range(5):
        other.step(first.upper, first.lower)
    second, third = copy.deepcopy(first), pickled((first, other))
    assert third[1].residual == 0.0
    resumed = second.trainer(init_steps=7)
    resumed.load_state_dict(other.state_dict())
    for _ in range(6):
        resumed.step(second.upper, second.lower)
        third[1].step(third[0].upper, third[0].lower)
    assert torch.equal(second.x, whole.x)
    assert torch.equal(third[0].x, whole.x)
    assert torch.equal(second.y, whole.y)


def test_the_residual_tells_a_step_of_z_that_is_too_large() -> None:
    """The lower Hessian is the identity: nu below 2 comes closer, above 2 runs away."""
    for nu, closer in ((0.5, True), (2.5, False)):
        problem = Quadratic()
        trainer = problem.trainer(nu=nu, lr=1e-6)
        trainer.step(problem.upper, problem.lower)
        first = trainer.residual
        for _ in range(8):
            trainer.step(problem.upper, problem.lower)
        assert (trainer.residual < first) == closer


def test_lower_steps_stay_in_their_ball() -> None:
    problem = Quadratic()
    trainer = problem.trainer(radius=0.05, inner_steps=50)
    for _ in range(4):
        before = problem.y.detach().clone()
        trainer.step(problem.upper, problem.lower)
        assert float((problem.y.detach() - before).norm()) <= 0.05 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0}, "lr=0 is not possible"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"interval": 0}, "interval=0"),
        ({"radius": -1.0}, "radius=-1.0"),
        ({"clip": 1.0}, "clip=1.0 has no effect on normalised steps"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Quadratic().trainer(**options)


def test_both_levels_are_needed() -> None:
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ConfigError, match="role='lower'; BO-REP needs both levels"):
        BORep([{"params": [x], "role": "upper"}])
    with pytest.raises(ConfigError, match="role=None of a param group"):
        BORep([x])  # type: ignore[list-item]


# Federated: everything deterministic (whole local sets as batches).


def representation(num_clients: int = 3) -> HyperRepresentation:
    return HyperRepresentation(num_clients=num_clients, features=6, support=5)


def final(strategy: Any, task: Any, rounds: int) -> tuple[Any, LocalGrid]:
    grid = LocalGrid(client_app(task, batch_size=10_000), task.num_clients)
    strategy.start(grid, task.initial_arrays(), num_rounds=rounds)
    assert all(report.outcome == "ok" for report in strategy.reports), strategy.reports[0].reason
    return strategy.x, grid


def test_federated_steps_have_the_length_eta_and_heads_stay() -> None:
    task = representation()
    start = ParameterLayout.from_arrays(task.initial_arrays()).flatten(task.initial_arrays())
    x, grid = final(ServerBORep(eta=0.1), task, 1)
    assert float(np.linalg.norm(x - start)) == pytest.approx(0.1, rel=1e-5)
    assert "y" in repr(grid.state_dict()["clients"]["0"])


def test_a_head_is_refined_again_after_more_than_an_interval_of_absence() -> None:
    task = representation(1)
    app = client_app(task, batch_size=10_000)
    context = new_context(node_id=0, node_config={"partition-id": 0})

    def head(server_round: int, refresh: bool) -> Any:
        config: dict[str, Any] = {keys.SERVER_ROUND: server_round, keys.LOCAL_UPDATE: "bo-rep"}
        config |= {keys.REFRESH: refresh, keys.INTERVAL: 2, keys.LOWER_LR: 0.5, keys.NU: 0.1}
        config |= {keys.INNER_STEPS: 0, keys.INIT_STEPS: 5}  # Only refining moves the head.
        content = RecordDict({keys.ARRAYS: task.initial_arrays(), keys.CONFIG: ConfigRecord(config)})
        app(request(content, dst_node_id=0), context)
        size = sum(t.numel() for t in task.initial_own(0))
        return ClientState(context.state, "bo-rep", server_round + 1).load(size)["y"].copy()

    first = head(1, True)
    assert np.array_equal(head(2, False), first)
    assert np.array_equal(head(4, True), first)  # One round missed.
    assert not np.array_equal(head(7, False), first)  # Two missed: 7 - 4 > 2.


def test_identical_clients_are_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    task = representation()
    for name in ("client_data", "upper_data"):
        data = getattr(task, name)(0)
        monkeypatch.setattr(task, name, lambda client, data=data: data)
    three, _ = final(ServerBORep(eta=0.1), task, 4)
    task.num_clients = 1
    one, _ = final(ServerBORep(eta=0.1), task, 4)
    np.testing.assert_allclose(three, one, rtol=1e-5, atol=1e-6)


def test_the_server_step_is_the_trainers_on_the_sum_of_clients() -> None:
    """Variant A against the trainer on one joint problem, all heads side by side; equal weights p_k."""
    task = representation(2)
    x, _ = final(ServerBORep(eta=0.1, interval=1, init_steps=0, inner_steps=2, lower_lr=0.5, nu=0.1), task, 4)
    model = task.seeded_model(task.seed)
    heads = [[t.requires_grad_() for t in task.initial_own(c)] for c in range(2)]
    trainer = BORep(
        [
            {"params": list(model.parameters()), "role": "upper"},
            {"params": [*heads[0], *heads[1]], "role": "lower"},
        ],
        lr=0.1, lower_lr=0.5, nu=0.1, interval=1, inner_steps=2,
    )  # fmt: skip

    def losses(level: str) -> Tensor:
        total = torch.zeros(())
        for client, head in enumerate(heads):
            data = task.upper_data(client) if level == "upper" else task.client_data(client)
            loss = task.upper_loss(model, head, (data.x, data.y)) if level == "upper" else None
            rows = torch.arange(len(data))
            loss = task.lower_loss(model, head, (data.x, data.y), rows) if loss is None else loss
            total = total + loss
        return total

    # The first round refines y with init_steps = 0: the trainer's first refresh must not move it.
    for group in trainer.param_groups:
        group["inner_steps"] = 0
    trainer.step(lambda: losses("upper"), lambda: losses("lower"))
    for group in trainer.param_groups:
        group["inner_steps"] = 2
    for _ in range(3):
        trainer.step(lambda: losses("upper"), lambda: losses("lower"))
    joint = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    np.testing.assert_allclose(x, joint, rtol=1e-4, atol=1e-5)


def test_federated_cleaning_is_the_algorithm_on_the_pool() -> None:
    """Variant C with one lower step a refresh: y, z and every client's x as in one place (h before z)."""
    task = HyperCleaning(num_clients=3, train_examples=60, validation_examples=30)
    eta, nu, alpha, interval, rounds = 0.5, 0.5, 0.8, 2, 9
    strategy = BORepLocalUpper(eta=eta, nu=nu, lower_lr=alpha, interval=interval, inner_steps=1, init_steps=1)
    y_end, _ = final(strategy, task, rounds)
    model = task.seeded_model(task.seed)
    y = list(model.parameters())
    xs = [torch.zeros(task.num_examples(c), requires_grad=True) for c in range(3)]
    ms = [torch.zeros_like(x) for x in xs]
    z = [torch.zeros_like(p) for p in y]

    def upper() -> Tensor:
        parts = [task.upper_data(c) for c in range(3)]
        return sum(task.upper_loss(model, [], (d.x, d.y)) for d in parts) / 3  # type: ignore[return-value]

    def lower() -> Tensor:
        parts = [task.client_data(c) for c in range(3)]
        each = [
            task.lower_loss(model, [x], (d.x, d.y), torch.arange(len(d)))
            for x, d in zip(xs, parts, strict=True)
        ]
        return sum(each) / 3  # type: ignore[return-value]

    for r in range(rounds):
        if r % (interval + 1) == 0:
            steps = torch.autograd.grad(lower(), y)
            with torch.no_grad():
                for p, g in zip(y, steps, strict=True):
                    p -= alpha * g
            continue
        found = hypergradient(xs, y, z, 0.0, upper, lower)
        with torch.no_grad():
            for m, h in zip(ms, found.upper, strict=True):
                m.mul_(0.9).add_(h, alpha=0.1)
            length = joint_norm(ms) or 1.0  # At first z = 0, and so are m and the step.
            for x, m in zip(xs, ms, strict=True):
                x -= eta * m / length
            for v, residual in zip(z, found.implicit, strict=True):
                v -= nu * residual
    np.testing.assert_allclose(y_end, torch.cat([p.detach().reshape(-1) for p in y]), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(strategy.implicit, torch.cat([v.reshape(-1) for v in z]), rtol=2e-3, atol=2e-4)


def test_cleaning_finds_the_wrong_labels() -> None:
    from turnout.wire.record_tree import decode_records

    task = HyperCleaning(num_clients=2, train_examples=80, validation_examples=80)
    strategy = BORepLocalUpper(eta=2.0, nu=1.0, lower_lr=1.0, inner_steps=5, init_steps=30)
    _, grid = final(strategy, task, 60)
    right, wrong = [], []
    for client in range(2):
        records = decode_records(grid.state_dict()["clients"][str(client)])
        x = ClientState(records, "bo-rep-local-upper", 61).load(task.num_examples(client))["x"]
        mask = task.wrong(client)
        wrong.append(x[mask].mean())
        right.append(x[~mask].mean())
    assert max(wrong) < min(right)


@pytest.mark.parametrize(
    ("strategy", "words"), [(ServerBORep, "shares its upper"), (BORepLocalUpper, "shares its lower")]
)
def test_an_ordinary_task_is_refused(strategy: Any, words: str) -> None:
    task = Digits(num_clients=2, model="softmax")
    made = strategy()
    made.start(LocalGrid(client_app(task), 2), task.initial_arrays(), num_rounds=1)
    assert words in made.reports[0].reason
    assert "task.name = 'hyper-" in made.reports[0].reason


def test_a_representation_has_no_loss_of_its_own() -> None:
    from turnout.strategies import FedAvg

    task = representation(2)
    strategy = FedAvg()
    strategy.start(LocalGrid(client_app(task), 2), task.initial_arrays(), num_rounds=1)
    assert "use strategy.name = 'bo-rep'" in strategy.reports[0].reason
    own = task.evaluate_model(task.seeded_model(0), task.client_data(0))
    assert 0.0 <= own["accuracy"] <= 1.0
