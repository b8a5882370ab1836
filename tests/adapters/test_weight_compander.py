"""Weight Compander's invariants: the function, its inverse, and steps in v while W travels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from turnout.client import FlatModel
from turnout.peft import Compander, WeightCompanderConfig, attach
from turnout.peft.weight_compander import WeightCompander
from turnout.wire import ConfigError

V = torch.linspace(-6, 6, 101, dtype=torch.float64)


def test_the_function_is_odd_increasing_and_bounded() -> None:
    psi = Compander(1.5, 0.5)
    w = psi(V)
    torch.testing.assert_close(psi(-V), -w)
    assert (w.diff() > 0).all()
    assert w.abs().max() < 1.5 * math.pi / 2
    v = V.clone().requires_grad_()
    (slope,) = torch.autograd.grad(psi(v).sum(), v)
    torch.testing.assert_close(slope, 3.0 / (1 + (V / 0.5) ** 2))
    torch.testing.assert_close(psi.right_inverse(w), V, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(Compander(3.0, 1.0)(V), 2 * psi(V / 2))
    assert torch.autograd.gradcheck(psi, V[::10].clone().requires_grad_())
    # Small values are spread, large ones compressed.
    assert (w.abs() > V.abs())[(V.abs() < 1.5) & (V != 0)].all()
    assert (w.abs() < V.abs())[V.abs() > 2.5].all()


def test_beyond_the_bound_the_inverse_stays_finite() -> None:
    psi = Compander(1.0, 0.5)
    v = psi.right_inverse(torch.tensor([10.0, -10.0]))
    assert torch.isfinite(v).all()
    assert (psi(v).abs() < math.pi / 2).all()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


X = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("transfer", ["effective", "latent"])
def test_a_pretrained_model_keeps_its_function_and_exports_it(transfer: str) -> None:
    plain = net()
    adapted = attach(net(), WeightCompanderConfig(transfer=transfer))  # type: ignore[arg-type]
    torch.testing.assert_close(adapted.module(X), plain(X), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for tensor in adapted.trainable_state_dict().values():
            tensor += 0.02
    output = adapted.module(X)
    adapted.merge()
    exported = net()
    exported.load_state_dict(
        {
            name.replace("base_layer.", ""): t
            for name, t in adapted.module.state_dict().items()
            if ".wc_" not in name and "._" not in name
        }
    )
    torch.testing.assert_close(exported(X), output, atol=1e-6, rtol=1e-5)
    adapted.unmerge()


class Steps:
    """The client's loop on a flat model, as `turnout.client.descent` has it."""

    def __init__(self, **options: object) -> None:
        self.adapted = attach(net(), WeightCompanderConfig(**options))  # type: ignore[arg-type]
        self.model = FlatModel(self.adapted.module)

    def run(self, steps: int, optimizer: str = "SGD", lr: float = 0.1) -> None:
        model, parts = self.model, self.model.parts
        leaf = model.parameters.detach().requires_grad_()
        leaf.grad = model.gradient
        take = getattr(torch.optim, optimizer)([leaf], lr=lr).step
        parts.start(1, (0,))
        for _ in range(steps):
            parts.before_step(lambda: torch.zeros(()))
            model.gradient.zero_()
            nn.functional.cross_entropy(model.module(X), Y).backward()
            parts.after_gradient()
            parts.enter_step()
            take()
            parts.leave_step()
        parts.end()

    def weights(self) -> list[torch.Tensor]:
        return [layer.trained_weight().detach().clone() for layer in self.adapted.layers.values()]  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("learnable", [False, True])
def test_steps_on_travelling_weights_are_those_on_latent_ones(optimizer: str, learnable: bool) -> None:
    lr = 0.1 if optimizer == "SGD" else 0.01
    effective = Steps(learnable=learnable, shape_lr=1.0)
    latent = Steps(transfer="latent", learnable=learnable)
    start = effective.weights()
    for run in (effective, latent):
        run.run(10, optimizer, lr)
    for w, v, w_0 in zip(effective.weights(), latent.weights(), start, strict=True):
        torch.testing.assert_close(w, v, atol=2e-5, rtol=1e-3)
        assert (w - w_0).abs().max() > 1e-3


def test_it_is_torchs_parametrization() -> None:
    module = net()
    layers = [m for m in module if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        a = float(1.5 * layer.weight.detach().abs().max())
        parametrize.register_parametrization(layer, "weight", Compander(a, a / 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    steps = Steps(transfer="latent")
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X), Y).backward()
        optimizer.step()
    steps.run(5)
    for layer, w in zip(layers, steps.weights(), strict=True):
        torch.testing.assert_close(layer.weight.detach(), w, atol=1e-6, rtol=1e-4)


def test_one_step_goes_with_the_square_of_the_slope() -> None:
    steps = Steps()
    layers = list(steps.adapted.layers.values())
    nn.functional.cross_entropy(steps.model.module(X), Y).backward()
    before, gradients = steps.weights(), [layer.wc_weight.grad.clone() for layer in layers]  # type: ignore[union-attr]
    lr = 1e-3
    steps.run(1, lr=lr)
    for layer, w, w_0, g in zip(layers, steps.weights(), before, gradients, strict=True):
        assert isinstance(layer, WeightCompander)
        a, b = layer.compander.a, layer.compander.b
        slope = (a / b) / (1 + torch.tan(w_0 / a) ** 2)
        torch.testing.assert_close(w - w_0, -lr * slope**2 * g, atol=2e-6, rtol=0.05)


def test_far_from_its_bound_it_is_plain_training() -> None:
    steps = Steps(a=1e5, gain=1.0)
    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(X), Y).backward()
        optimizer.step()
    steps.run(10)
    weights = [m.weight for m in plain if isinstance(m, (nn.Linear, nn.Conv2d))]
    for w, expected in zip(steps.weights(), weights, strict=True):
        torch.testing.assert_close(w, expected.detach(), atol=1e-4, rtol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(-0.99, 0.99)), min_size=1, max_size=6), st.floats(0.1, 5)
)
def test_the_mean_of_clients_weights_has_a_latent_weight(
    clients: list[tuple[float, float]], b: float
) -> None:
    bounds = np.array([a for a, _ in clients])
    weights = np.array([a * part * math.pi / 2 for a, part in clients])
    mean, bound = torch.tensor(weights.mean()), torch.tensor(bounds.mean())
    assert mean.abs() < bound * math.pi / 2
    psi = Compander(bound, torch.tensor(b))
    torch.testing.assert_close(psi(psi.right_inverse(mean)), mean, atol=float(bound) * 1e-4, rtol=1e-6)


def test_the_mean_of_latent_weights_is_another() -> None:
    psi = Compander(1.5, 0.5)
    v = torch.tensor([0.1, 2.0])
    assert abs(float(psi(v).mean() - psi(v.mean()))) > 0.1
    assert float(psi(torch.full((3,), 0.7)).mean()) == pytest.approx(float(psi(torch.tensor(0.7))))


def test_a_known_range_bounds_the_error_of_quantisation() -> None:
    psi, bits = Compander(1.5, 0.5), 6
    bound = 1.5 * math.pi / 2
    w = psi(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3)
    step = 2 * bound / (2**bits - 1)
    quantised = torch.round((w + bound) / step) * step - bound
    assert (quantised - w).abs().max() <= 1.5 * math.pi / (2 * (2**bits - 1)) + 1e-6


def test_trained_shapes_stay_positive_and_move() -> None:
    steps = Steps(learnable=True, shape_lr=1.0)
    before = [float(layer.wc_a.detach()) for layer in steps.adapted.layers.values()]  # type: ignore[arg-type]
    steps.run(30, lr=0.3)
    after = [float(layer.wc_a.detach()) for layer in steps.adapted.layers.values()]  # type: ignore[arg-type]
    assert min(after) > 0
    assert before != after
    assert all(0 <= layer.saturated_share() <= 1 for layer in steps.adapted.layers.values())  # type: ignore[operator]


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"a=0\.5"):
        WeightCompanderConfig(a=0.5)
    module = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(module[0].weight)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="only zeros"):
        attach(module, WeightCompanderConfig())
