"""EGGROLL as an optimizer of any PyTorch model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from turnout.optim import EGGROLL
from turnout.optim.perturbed import Perturbed
from turnout.wire import ConfigError, ParameterLayout, as_array
from turnout.wire.perturbation import NoiseSource, dense, model_tensors
from turnout.wire.replica import Replica, Search


def perceptron(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def bytes_of(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def problem(model: nn.Module) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 8, generator=generator)
    y = x[:, :3].argmax(dim=1)
    return lambda: -nn.functional.cross_entropy(model(x), y).item()


@pytest.mark.parametrize("rank", [1, 4])
def test_factored_forward_equals_the_dense_one(rank: int) -> None:
    """``x W^T + s sigma / sqrt(r) (x B) A^T`` against a forward pass of the perturbed weight."""
    layer, x, sigma = nn.Linear(12, 7, bias=False), torch.randn(5, 12), 0.3
    source = NoiseSource(model_tensors({"weight": (7, 12)}, rank, freeze_1d=False), 1, rank)
    draws = source.draw(1, 0)
    a, b = torch.from_numpy(draws[0].a), torch.from_numpy(draws[0].b)  # type: ignore[union-attr]
    saved = layer.weight.detach().clone()
    perturbed = Perturbed(source, [layer.weight])
    for sign in (1.0, -1.0):
        perturbed.write(draws, sign * sigma)
        factored = x @ saved.T + sign * sigma / rank**0.5 * (x @ b) @ a.T
        assert torch.allclose(layer(x), factored, atol=3e-6)
        e = torch.from_numpy(dense(draws[0], source.tensors[0], rank)).float()
        assert torch.allclose(layer.weight, saved + sign * sigma * e, atol=1e-6)
    perturbed.restore()
    assert torch.equal(layer.weight, saved)


def test_a_linear_fitness_gives_the_directional_derivative_exactly() -> None:
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    g = torch.randn(5, 6, dtype=torch.float64)
    optimizer = EGGROLL(layer.named_parameters(), lr=0.1, sigma=0.25, pairs=8)
    differences, _ = optimizer.evaluate(lambda: (g * layer.weight).sum().item(), range(8))
    (source,) = optimizer._sources
    for j, d in enumerate(differences):
        e = dense(source.draw(1, j)[0], source.tensors[0], 1)
        assert d / (2 * 0.25) == pytest.approx(float((g.numpy() * e).sum()), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.9, "rank": None, "noise": "rademacher"},
        {"lr": 0.02, "base": "adam", "rank": 2, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_it_learns_without_gradients(options: dict[str, Any]) -> None:
    model = perceptron()
    measure = problem(model)
    optimizer = EGGROLL(model.named_parameters(), sigma=0.05, pairs=8, **options)
    before = measure()
    for _ in range(25):
        optimizer.step(measure)
    assert measure() > 0.8 * before
    assert all(p.grad is None for p in model.parameters())


def test_a_constant_changes_nothing_and_a_factor_scales() -> None:
    start, moved = perceptron(), []
    for change in (lambda f: f, lambda f: f + 1024.0, lambda f: 2.0 * f):
        model = perceptron()
        layer, x = model, torch.ones(1, 8)

        def fitness(change: Any = change, layer: nn.Module = layer, x: Any = x) -> float:
            # Multiples of 1/256: adding 1024 is exact.
            return float(change(torch.round(layer(x).sum() * 256) / 256))

        EGGROLL(model.named_parameters(), lr=0.5, sigma=0.1, pairs=4).step(fitness)
        moved.append(np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]))
    base = np.concatenate([p.detach().numpy().ravel() for p in start.parameters()])
    assert np.array_equal(moved[0], moved[1])
    assert np.allclose(moved[2] - base, 2 * (moved[0] - base), atol=1e-6)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_server_rebuilds_the_step_from_scalars_to_the_bit(base: Any) -> None:
    model, other = perceptron(), perceptron()
    options = {"lr": 0.05, "sigma": 0.1, "momentum": 0.9, "base": base, "seed": 11}
    first = EGGROLL(model.named_parameters(), pairs=6, **options)
    second = EGGROLL(other.named_parameters(), pairs=6, **options)
    arrays = {name: as_array(p.detach().numpy().copy()) for name, p in model.named_parameters()}
    layout = ParameterLayout.from_arrays(arrays)
    search = Search(**{**options, "momentum": 0.9 if base == "sgd" else 0.0})  # type: ignore[arg-type]
    replica = Replica.begin(search, search.source(layout), layout.flatten(arrays).copy())
    measure, order = problem(model), [4, 0, 5, 2, 1, 3]
    for t in range(1, 5):
        differences, _ = first.evaluate(measure, range(6))
        weights = differences / (2 * 6 * 0.1)
        first.apply_pairs(range(6), weights)
        second.apply_pairs(order, weights[order])
        replica = replica.moved(t, weights)
    assert bytes_of(model) == bytes_of(other) == replica.theta.tobytes()


def test_state_dict_continues_to_the_bit() -> None:
    model = perceptron()
    optimizer = EGGROLL(model.named_parameters(), lr=0.05, sigma=0.1, pairs=4, base="adam", seed=3)
    measure = problem(model)
    for _ in range(3):
        optimizer.step(measure)
    twin = perceptron(1)
    twin.load_state_dict(model.state_dict())
    resumed = EGGROLL(twin.named_parameters(), lr=9.0, sigma=9.0, pairs=1)
    resumed.load_state_dict(optimizer.state_dict())
    assert (resumed.seed, resumed.round, resumed.sigma, resumed.pairs) == (3, 4, 0.1, 4)
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    optimizer.step(measure)
    resumed.step(problem(twin))
    its_optimizer.step(problem(copied))
    assert bytes_of(model) == bytes_of(twin) == bytes_of(copied)
    with pytest.raises(ConfigError, match="same names"):
        EGGROLL(twin.parameters(), lr=1.0, sigma=0.1).load_state_dict(optimizer.state_dict())


def test_groups_say_what_is_perturbed_and_tied_weights_get_one_draw() -> None:
    embedding = nn.Embedding(9, 4)
    head = nn.Linear(4, 9, bias=True)
    head.weight = embedding.weight
    frozen = head.bias.detach().clone()
    optimizer = EGGROLL(
        [
            {"params": [("weight", embedding.weight)], "rank": 2},
            {"params": [("bias", head.bias)], "eggroll": "frozen"},
        ],
        lr=0.1,
        sigma=0.1,
        pairs=3,
    )
    optimizer.step(lambda: float(head(embedding(torch.tensor([1, 2]))).sum()))
    assert optimizer.names == ["weight", "bias"]
    assert torch.equal(head.bias, frozen)
    assert [s.tensors[0].kind for s in optimizer._sources] == ["lowrank", "frozen"]
    assert [t.kind for t in EGGROLL([head.bias], 0.1, 0.1, freeze_1d=True)._sources[0].tensors] == ["frozen"]


def test_members_see_the_same_dropout_and_weights_come_back() -> None:
    layer, drop = nn.Linear(50, 1, bias=False), nn.Dropout(0.5)
    saved, seen = layer.weight.detach().clone(), []

    def fitness() -> float:
        seen.append(drop(torch.ones(50)))
        return float("nan") if len(seen) == 1 else float(layer(seen[-1]))

    optimizer = EGGROLL(layer.named_parameters(), lr=0.1, sigma=0.1, pairs=2)
    differences, _ = optimizer.evaluate(fitness, range(2))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(layer.weight, saved)
    assert differences[0] == 0.0  # A member without a number decides nothing.
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(layer.weight, saved)


def test_bad_settings_are_named_and_the_code_rate_is_converted() -> None:
    layer = nn.Linear(3, 2)
    for options, text in (
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"pairs": 0}, "pairs=0"),
        ({"rank": 0}, "rank=0"),
        ({"noise": "cauchy"}, "unknown noise 'cauchy'"),
        ({"base": "lion"}, "unknown base 'lion'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"betas": (0.9, 1.0)}, "betas=1.0"),
    ):
        with pytest.raises(ConfigError, match=text):
            EGGROLL(layer.parameters(), **{"lr": 0.1, "sigma": 0.1, **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float32"):
        EGGROLL(layer.bfloat16().parameters(), 0.1, 0.1)
    with pytest.raises(ConfigError, match="closure"):
        EGGROLL(nn.Linear(3, 2).parameters(), 0.1, 0.1).step()
    assert EGGROLL.textbook_lr(2.0, 0.1, 8) == pytest.approx(2.0 * 0.01 * 4.0)
