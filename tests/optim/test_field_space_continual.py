"""Field space's invariants (arXiv 2212.02846): layers, divergence, optimizer, merges, bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from turnout.client import client_app
from turnout.client.state import ClientState
from turnout.optim import (
    BinaryFieldConv2d,
    BinaryFieldLinear,
    FieldOptimizer,
    annealed,
    field_groups,
    field_kl,
    rescale_fields,
    set_temperature,
)
from turnout.simulation import LocalGrid
from turnout.strategies import FieldSpaceContinual, Reply
from turnout.tasks import Permuted
from turnout.wire import ConfigError, LayoutError, ParameterLayout, as_array, as_sign_array, keys, view
from turnout.wire.flower import new_context, request

DOUBLE = torch.float64


def layer(kind: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return BinaryFieldLinear(5, 3).double(), torch.randn(4, 5, dtype=DOUBLE)
    return BinaryFieldConv2d(2, 3, 3, padding=1).double(), torch.randn(2, 2, 4, 4, dtype=DOUBLE)


def test_the_divergence_and_its_gradient() -> None:
    torch.manual_seed(1)
    theta, prior = torch.randn(200, dtype=DOUBLE, requires_grad=True), torch.randn(200, dtype=DOUBLE)
    for beta in (0.5, 1.0, 9.7):
        assert float(field_kl(theta, theta.detach(), beta).detach()) == pytest.approx(0.0, abs=1e-10)
        kl = field_kl(theta, prior, beta)
        assert float(kl.detach()) > 0
        (gradient,) = torch.autograd.grad(kl, [theta])
        spread = 1 - torch.tanh(beta * theta.detach()) ** 2
        assert torch.allclose(gradient, beta**2 * spread * (theta.detach() - prior), atol=1e-6)
        mu, mu0 = torch.tanh(beta * theta.detach()[:50] * 0.1), torch.tanh(beta * prior[:50] * 0.1)
        plain = 0.5 * ((1 + mu) * ((1 + mu) / (1 + mu0)).log() + (1 - mu) * ((1 - mu) / (1 - mu0)).log())
        closed = field_kl(theta.detach()[:50] * 0.1, prior[:50] * 0.1, beta)
        assert float(closed) == pytest.approx(float(plain.sum()), rel=1e-8)
    far = field_kl(torch.tensor([1e4]), torch.tensor([-1e4]), 10.0)
    assert math.isfinite(float(far))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_moments_are_those_of_sampled_binary_weights(kind: str) -> None:
    made, x = layer(kind)
    mean, variance = made.moments(x)
    chance = (1 + made.magnetisation()) / 2
    weights = (torch.rand(4000, *chance.shape) < chance).double() * 2 - 1
    samples = torch.func.vmap(lambda w: made.apply_weights(x, w))(weights) / math.sqrt(made.fan_in)
    error = 5 * (variance / 4000).sqrt() + 1e-9
    assert bool(((samples.mean(0) - mean).abs() <= error).all())
    assert torch.allclose(samples.var(0), variance, rtol=0.2, atol=1e-3)
    made.train()
    noisy = made(x.repeat(4000, *[1] * (x.dim() - 1))).unflatten(0, (4000, len(x)))
    assert bool(((noisy.mean(0) - mean).abs() <= error).all())
    assert torch.allclose(noisy.var(0), variance, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_saturated_fields_are_a_binary_layer(kind: str) -> None:
    made, x = layer(kind)
    with torch.no_grad():
        made.theta.mul_(1e6)
    mean, variance = made.moments(x)
    assert float(variance.detach().abs().max()) == 0.0
    made.eval()
    assert torch.allclose(made(x), mean)
    z = made.train()(x)
    assert torch.allclose(z, mean, atol=1e-4)
    torch.autograd.backward(z.square().sum())
    assert not made.theta.grad.any()  # Not NaN, though a root of zero variance was taken.


def test_zero_fields_are_pure_noise() -> None:
    made, x = layer("linear")
    with torch.no_grad():
        made.theta.zero_()
    mean, variance = made.moments(x)
    assert float(mean.detach().abs().max()) == 0.0
    expected = x.square().sum(1, keepdim=True).expand(-1, 3) / 5
    assert torch.allclose(variance, expected)


def test_only_the_product_of_field_and_temperature_matters() -> None:
    made, x = layer("linear")
    before = made.moments(x)
    rescale_fields(made, 4.0)
    assert made.beta == 4.0
    for one, other in zip(before, made.moments(x), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    set_temperature(made, 8.0)
    assert not torch.allclose(before[0], made.moments(x)[0])


def test_certain_weights_get_no_gradient() -> None:
    made, x = layer("linear")
    with torch.no_grad():
        made.theta[0] = 30.0
    made.train()
    torch.autograd.backward(made(x).square().sum())
    assert float(made.theta.grad[0].abs().max()) < 1e-12
    assert float(made.theta.grad[1:].abs().min()) > 0


def test_the_gradient_is_the_papers_formula() -> None:
    made, a = layer("linear")
    set_temperature(made, 1.7)
    made.generator = torch.Generator().manual_seed(3)
    z = made.train()(a)
    d = torch.randn_like(z)
    torch.autograd.backward((d * z).sum())
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    theta, n = made.theta.detach(), 5
    mu = torch.tanh(1.7 * theta)
    _, variance = (m.detach() for m in made.moments(a))
    dv = d * eps / variance.sqrt()
    expected = 1.7 * (1 - mu**2) * (d.T @ a / math.sqrt(n) - mu * (dv.T @ (a * a)) / n)
    assert torch.allclose(made.theta.grad, expected, rtol=1e-6, atol=1e-9)


class TestOptimizer:
    def test_a_huge_divergence_keeps_the_prior(self) -> None:
        p = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=DOUBLE))
        optimizer = FieldOptimizer([p], lr=0.001, kl_weight=1e9)
        optimizer.new_task()
        for _ in range(300):
            p.grad = torch.tensor([1.0, -2.0], dtype=DOUBLE)
            optimizer.step()
        assert torch.allclose(p.detach(), torch.tensor([0.3, -0.2], dtype=DOUBLE), atol=0.005)

    def test_plain_parameters_get_adam(self) -> None:
        one, other = (torch.nn.Parameter(torch.tensor([0.3, -0.2])) for _ in range(2))
        ours = FieldOptimizer([{"params": [one], "role": "plain"}], lr=0.01, kl_weight=5.0, beta=2.0)
        adam = torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.99))
        for t in range(10):
            one.grad = other.grad = torch.tensor([1.0 + t, -2.0])
            ours.step()
            adam.step()
        assert torch.allclose(one, other, rtol=1e-6)

    def test_the_stream_prior_is_the_step_before(self) -> None:
        p = torch.nn.Parameter(torch.tensor([0.3]))
        optimizer = FieldOptimizer([p], prior="stream", kl_weight=1.0)
        for _ in range(3):
            before = p.detach().clone()
            p.grad = torch.ones(1)
            optimizer.step()
            assert torch.equal(optimizer.state[p]["theta0"], before)

    def test_natural_steps_are_scaled_by_the_variance(self) -> None:
        p = torch.nn.Parameter(torch.tensor([0.0, 3.0]))
        FieldOptimizer([p], lr=0.01, natural=True, prior="none")
        optimizer = FieldOptimizer([p], lr=0.01, natural=True, prior="none")
        p.grad = torch.ones(2)
        optimizer.step()
        moved = torch.tensor([0.0, 3.0]) - p.detach()
        assert float(moved[0]) == pytest.approx(0.01, rel=1e-3)
        assert float(moved[1]) == pytest.approx(0.01 * (1 - math.tanh(3.0) ** 2), rel=1e-2)

    def test_a_state_dict_resumes(self) -> None:
        def steps(optimizer: Any, p: Any, count: int) -> None:
            for _ in range(count):
                p.grad = torch.cos(3 * p.detach())
                optimizer.step()

        whole, first = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
        one = FieldOptimizer([whole], kl_weight=0.5)
        steps(one, whole, 9)
        two = FieldOptimizer([first], kl_weight=0.5)
        steps(two, first, 4)
        three = FieldOptimizer([first], kl_weight=0.5)
        three.load_state_dict(two.state_dict())
        steps(three, first, 5)
        assert torch.equal(whole, first)

    def test_closures_and_bad_settings(self) -> None:
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.ones(1)
        assert FieldOptimizer([p]).step(lambda: 2.5) == 2.5
        with pytest.raises(ConfigError, match="unknown prior 'last'"):
            FieldOptimizer([p], prior="last")  # type: ignore[arg-type]
        optimizer = FieldOptimizer([{"params": [p]}])
        for wrong, words in (({"role": "mean"}, "unknown role 'mean'"), ({"betas": (0.9, 1.0)}, "betas=1")):
            with pytest.raises(ConfigError, match=words):
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], **wrong})
        p.grad = torch.zeros(1).to_sparse()
        with pytest.raises(ConfigError, match="sparse gradient"):
            optimizer.step()
        with pytest.raises(ConfigError, match="complex64"):
            FieldOptimizer([torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))])

    def test_half_precision_fields_have_moments_in_float32(self) -> None:
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = FieldOptimizer([p], kl_weight=0.1)
        for _ in range(3):
            p.grad = torch.full((3,), 1e-3, dtype=torch.bfloat16)
            optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
        assert (p < 1).all()

    def test_groups_of_a_model(self) -> None:
        model = torch.nn.Sequential(BinaryFieldLinear(3, 2), torch.nn.BatchNorm1d(2))
        fields, plain = field_groups(model)
        assert [len(g["params"]) for g in (fields, plain)] == [1, 2]
        made = FieldOptimizer.for_module(model, kl_weight=0.1)
        assert [(g["role"], len(g["params"])) for g in made.param_groups] == [("field", 1), ("plain", 2)]


def test_the_temperature_schedule_is_the_same_on_both_sides() -> None:
    strategy = FieldSpaceContinual(total_rounds=24)
    for r in range(1, 25):
        assert strategy.inverse_temperature(r) == pytest.approx(annealed(r - 1, 24), rel=1e-12)
    assert (
        strategy.inverse_temperature(99) == strategy.inverse_temperature(24) == pytest.approx(9.7, abs=0.01)
    )


class TestMerge:
    MERGES = ("log-odds", "magnetisation")

    @staticmethod
    def merged(
        merge: str, models: list[np.ndarray], start: np.ndarray | None = None, beta: float = 2.0
    ) -> Any:
        options: dict[str, Any] = {
            "merge": merge,
            "temperature": "constant",
            "beta": beta,
            "weighting": "uniform",
        }
        strategy = FieldSpaceContinual(**options)
        x = np.zeros(4) if start is None else start
        strategy.prepare(x.copy())
        strategy.begin_round(1, range(len(models)))
        strategy.select(1, list(range(len(models))))
        for client, model in enumerate(models):
            update = model - x
            strategy.accept(1, Reply(client, update, 1, float(np.abs(update).max())))
        return strategy.end_round(1)

    @pytest.mark.parametrize("merge", MERGES)
    def test_identical_clients_are_the_identity_and_order_does_not_matter(self, merge: str) -> None:
        rng = np.random.default_rng(0)
        models = [rng.standard_normal(4) for _ in range(3)]
        np.testing.assert_allclose(self.merged(merge, [models[0]] * 3), models[0], rtol=1e-7)
        assert np.array_equal(self.merged(merge, models), self.merged(merge, models[::-1]))

    def test_each_rule(self) -> None:
        rng = np.random.default_rng(1)
        start, models = rng.standard_normal(4), [rng.standard_normal(4) for _ in range(3)]
        np.testing.assert_allclose(self.merged("log-odds", models, start), np.mean(models, 0), rtol=1e-9)
        product = start + sum(m - start for m in models)
        np.testing.assert_allclose(self.merged("posterior-product", models, start), product, rtol=1e-9)
        means = np.mean([np.tanh(2.0 * m) for m in models], 0)
        np.testing.assert_allclose(
            self.merged("magnetisation", models, start), np.arctanh(means) / 2, rtol=1e-6
        )

    def test_certain_clients_do_not_give_infinite_fields(self) -> None:
        merged = self.merged("magnetisation", [np.full(4, 50.0)] * 2)
        assert np.isfinite(merged).all()
        assert (merged > 1).all()

    def test_only_fields_are_merged_as_fields(self) -> None:
        strategy = FieldSpaceContinual(merge="magnetisation", temperature="constant", beta=1.0)
        record = ArrayRecord()
        record["0.theta"] = as_array(np.zeros(2, np.float32))
        record["1.bias"] = as_array(np.zeros(2, np.float32))
        strategy.adopt(record)
        strategy.begin_round(1, range(2))
        strategy.select(1, [0, 1])
        for client, value in enumerate((0.0, 2.0)):
            strategy.accept(1, Reply(client, np.full(4, value, np.float32), 1, value))
        x = strategy.end_round(1)
        np.testing.assert_allclose(x[2:], 1.0)
        np.testing.assert_allclose(x[:2], np.arctanh(np.tanh(2.0) / 2), rtol=1e-6)

    def test_posterior_product_counts_clients_alike(self) -> None:
        with pytest.raises(ConfigError, match="weighting"):
            FieldSpaceContinual(merge="posterior-product")


@pytest.mark.parametrize("prior", ["round", "task"])
def test_a_huge_divergence_holds_clients_to_the_prior_that_was_sent(prior: Any) -> None:
    task = Permuted(num_clients=2, width=12)
    start = ParameterLayout.from_arrays(task.initial_arrays()).flatten(task.initial_arrays())
    moved = {}
    for weight in (0.0, 1e12):
        grid = LocalGrid(client_app(task, lr=0.01, local_steps=20), 2, executor="serial")
        strategy = FieldSpaceContinual(kl_weight=weight, prior=prior, temperature="constant")
        strategy.start(grid, task.initial_arrays(), num_rounds=3)
        moved[weight] = float(np.abs(strategy.x - start).mean())
    assert moved[1e12] < 0.2 * moved[0.0]


def test_clients_go_on_with_their_moments_if_told_to() -> None:
    task = Permuted(num_clients=1, width=12)
    app = client_app(task, lr=0.01, local_steps=5)
    contexts = {keep: new_context(node_id=0, node_config={"partition-id": 0}) for keep in (True, False)}

    def fields(keep: bool, server_round: int) -> np.ndarray:
        config: dict[str, Any] = {keys.SERVER_ROUND: server_round, keys.LOCAL_UPDATE: "field-space"}
        config |= {keys.TEMPERATURE: 2.0, keys.KL_WEIGHT: 0.0, keys.KEEP_MOMENTS: keep}
        content = RecordDict({keys.ARRAYS: task.initial_arrays(), keys.CONFIG: ConfigRecord(config)})
        reply = app(request(content, dst_node_id=0), contexts[keep]).content[keys.ARRAYS]
        return ParameterLayout.from_arrays(reply).flatten(reply).copy()

    assert np.array_equal(fields(True, 1), fields(False, 1))
    assert not np.array_equal(fields(True, 2), fields(False, 2))
    state = ClientState(contexts[True].state, "field-space", 3)
    assert state.number("step") == 10
    size = 64 * 12 + 12 * 12 + 12 * 10
    assert {name: vector.any() for name, vector in state.load(size).items()} == {
        "exp_avg": True,
        "exp_avg_sq": True,
    }
    assert not contexts[False].state


class TestBits:
    @pytest.mark.parametrize("shape", [(3, 5), (8,), (1, 1), (2, 3, 3, 3)])
    def test_a_weight_is_a_bit(self, shape: tuple[int, ...]) -> None:
        theta = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        array = as_sign_array(theta)
        assert len(array.data) == math.ceil(theta.size / 8)
        back = view(array)
        assert back.dtype == np.float32
        assert np.array_equal(back, np.where(theta >= 0, 1, -1))
        assert not back.flags.writeable

    def test_bytes_that_do_not_fit_are_refused(self) -> None:
        from flwr.app import Array

        with pytest.raises(LayoutError, match="needs 2 bytes, got 1"):
            view(Array("float32", (3, 4), "turnout.sign", b"\x00"))
        with pytest.raises(LayoutError, match="cannot be negative"):
            view(Array("float32", (-1, 8), "turnout.sign", b"\x00"))

    def test_clients_evaluate_the_deployed_bits(self) -> None:
        task = Permuted(num_clients=2, width=20)
        grid = LocalGrid(client_app(task, lr=0.02), 2)
        strategy = FieldSpaceContinual(total_rounds=2)
        result = strategy.start(grid, task.initial_arrays(), num_rounds=2, evaluate_config=ConfigRecord())
        seen = result.evaluate_metrics_clientapp[2]["accuracy"]
        model = task.loaded_model(strategy.arrays())
        own = [task.evaluate_model(model, task.client_data(c)) for c in range(2)]
        sizes = [task.num_examples(c) for c in range(2)]
        expected = np.average([m["accuracy"] for m in own], weights=sizes)
        assert seen == pytest.approx(expected, abs=1e-9)
        assert task.evaluate(strategy.deployed()) == task.evaluate(strategy.arrays())
        packed = sum(len(a.data) for a in strategy.deployed().values())
        assert packed == (64 * 20 + 20 * 20 + 20 * 10) // 8


def test_the_sequence_of_tasks_goes_by_rounds() -> None:
    task = Permuted(num_clients=1, num_tasks=3, rounds_per_task=4)
    assert [task.task_at(r) for r in (1, 4, 5, 8, 9, 99)] == [0, 0, 1, 1, 2, 2]
    data = task.client_data(0)
    first, later = task.examples_at(data, 1), task.examples_at(data, 5)
    assert torch.equal(first.x, data.x)
    assert not torch.equal(later.x, data.x)
    assert torch.equal(later.x.flatten(1).sort(1).values, data.x.flatten(1).sort(1).values)
    assert torch.equal(later.y, data.y)


@pytest.mark.parametrize("data", ["digits", "mnist5k"])
def test_pixels_have_a_second_moment_of_one(data: Any) -> None:
    """What 1/sqrt(fan-in) supposes: with grey values units are half as large, and tasks protected less."""
    x = Permuted(num_clients=1, data=data).client_data(0).x
    assert float(x.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(x.square().mean()) == pytest.approx(1.0, abs=0.02)
