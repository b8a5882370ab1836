"""ECO (arXiv 2601.22101): the law that rounding cannot break, the grids, and its limit without rounding."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turnout.optim import (
    ECOSGD,
    CodedLinear,
    ECOAdamW,
    FixedGrid,
    Float8Grid,
    IntegerGrid,
    Quantizer,
    coded_,
)
from turnout.wire import ConfigError

GRIDS: dict[str, str | float | Quantizer] = {
    "fixed": 0.125,
    "int4": "int4",
    "int8 in blocks": IntegerGrid(8, block=4),
    "fp8": "fp8",
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


class Identity(Quantizer):
    """No grid at all."""

    def scale(self, weights: Tensor) -> None:
        return None

    def steps(self, weights: Tensor, scale: Tensor | None) -> float:
        return 1.0

    def limit(self, scale: Tensor | None) -> None:
        return None

    def round(self, weights: Tensor, scale: Tensor | None, noise: Tensor | None = None) -> Tensor:
        return weights.clone()


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_grid
@pytest.mark.parametrize("rounding", ["sr", "rtn"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_conserved_quantity_moves_as_unrounded_weights_would(
    grid: Any, rounding: Any, decay: float, beta: float
) -> None:
    lr = 0.05
    a = 1 - lr * decay
    c = lr * beta / (a - beta)
    p = nn.Parameter(drawn(6, 8, seed=1))
    optimizer = ECOSGD([p], lr=lr, momentum=beta, weight_decay=decay, quantizer=grid, rounding=rounding)
    z = p.detach().clone()
    for step in range(60):
        g = drawn(6, 8, seed=step)
        p.grad = g
        optimizer.step()
        z = a * z - (1 - beta) * lr * (a / (a - beta)) * g
        held = p.detach() - c * optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(held, z, rtol=0.0, atol=1e-10)


def test_without_decay_it_is_sgd_on_the_virtual_weights() -> None:
    lr, beta = 0.1, 0.9
    p = nn.Parameter(drawn(4, 4, seed=2))
    start, total = p.detach().clone(), torch.zeros(4, 4, dtype=torch.float64)
    optimizer = ECOSGD([p], lr=lr, momentum=beta, quantizer="int2")
    for step in range(30):
        p.grad = drawn(4, 4, seed=step)
        total += p.grad
        optimizer.step()
    z = p.detach() - lr * beta / (1 - beta) * optimizer.state[p]["exp_avg"]
    torch.testing.assert_close(z, start - lr * total, rtol=0.0, atol=1e-10)


def test_the_adam_form_conserves_while_its_steps_stand_still() -> None:
    # A gradient of one size keeps v_hat at its square; late steps have no bias correction left.
    lr, (b1, b2) = 0.01, (0.9, 0.5)
    p = nn.Parameter(torch.zeros(3, 8, dtype=torch.float64))
    optimizer = ECOAdamW([p], lr=lr, betas=(b1, b2), quantizer=0.125, eps=0.0)
    signs = [torch.sign(drawn(3, 8, seed=step)) for step in range(400)]
    for g in signs[:350]:
        p.grad = 2.0 * g
        optimizer.step()
    c = lr * b1 / (1 - b1) / 2.0
    z = p.detach() - c * optimizer.state[p]["exp_avg"]
    for g in signs[350:]:
        p.grad = 2.0 * g
        optimizer.step()
        z = z - lr * g
        held = p.detach() - c * optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(held, z, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.full_like(p, 4.0).detach())


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_rounding_it_is_momentum_sgd_to_the_bit(ema: bool, decay: float) -> None:
    lr, beta = 0.05, 0.9
    start = drawn(5, 3, seed=3).float()
    p, x, M = nn.Parameter(start.clone()), start.clone(), torch.zeros_like(start)
    optimizer = ECOSGD([p], lr=lr, momentum=beta, weight_decay=decay, ema=ema, quantizer=Identity())
    torch_p = nn.Parameter(start.clone())
    sgd = torch.optim.SGD([torch_p], lr=lr, momentum=beta, foreach=False)
    for step in range(25):
        g = drawn(5, 3, seed=step).float()
        p.grad, torch_p.grad = g.clone(), g.clone()
        optimizer.step()
        sgd.step()
        M.mul_(beta).add_(g, alpha=1 - beta if ema else 1.0)
        if decay:
            x.mul_(1 - lr * decay)
        x.add_(M, alpha=-lr)
    assert torch.equal(p.detach(), x)
    assert torch.equal(p, torch_p) == (not ema and not decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_rounding_it_is_adamw_to_the_bit(decay: float) -> None:
    start = drawn(5, 3, seed=4).float()
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = ECOAdamW([p], lr=0.01, weight_decay=decay, quantizer=Identity())
    adamw = torch.optim.AdamW([q], lr=0.01, weight_decay=decay, foreach=False)
    for step in range(25):
        p.grad = drawn(5, 3, seed=step).float()
        q.grad = p.grad.clone()
        ours.step()
        adamw.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("rounding", ["sr", "rtn"])
@pytest.mark.parametrize("steps", [200, 2000])
def test_small_constant_gradients_are_not_lost(rounding: Any, steps: int) -> None:
    lr, step, g = 0.01, 0.125, 0.5  # lr g is a twenty-fifth of the grid's step.
    moved = {}
    for feedback in (True, False):
        p = nn.Parameter(torch.zeros(4, 25, dtype=torch.float64))
        optimizer = ECOSGD([p], lr=lr, quantizer=step, rounding=rounding, error_feedback=feedback, seed=3)
        for _ in range(steps):
            p.grad = torch.full((4, 25), g, dtype=torch.float64)
            optimizer.step()
        moved[feedback] = p.detach()
    error = moved[True] + lr * g * steps
    # By the law, W - z = c M, and M is bounded: a constant, whatever the number of steps.
    assert float(error.abs().max()) < 10 * step
    assert rounding == "sr" or not moved[False].any()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.booleans(), st.integers(0, 999), st.floats(1e-3, 1e3))
def test_weights_lie_on_the_grid_and_errors_are_below_a_step(
    name: str, stochastic: bool, seed: int, size: float
) -> None:
    p = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    p.grad = size * drawn(4, 8, seed=seed)
    lr, grid = 0.1, GRIDS[name]
    optimizer = ECOSGD(
        [p], lr=lr, quantizer=grid, rounding="sr" if stochastic else "rtn", error_feedback=False
    )
    wanted = -lr * (1 - 0.9) * p.grad
    optimizer.step()
    quantizer = grid if isinstance(grid, Quantizer) else optimizer_grid(grid)
    scale = optimizer.state[p].get("scale")
    weights, error = p.detach(), wanted - p.detach()
    again = quantizer.round(weights, scale)
    torch.testing.assert_close(again, weights, rtol=1e-12, atol=0.0)
    steps = quantizer.steps(wanted, scale)
    most = (1.0 if stochastic else 0.5) * torch.as_tensor(steps).expand_as(error)
    assert (error.abs() <= most * (1 + 1e-9)).all()
    if scale is not None:
        most = {"int4": 7, "int8 in blocks": 127, "fp8": 448}[name]
        codes = quantizer.encode(weights, scale)
        assert codes.double().abs().max() <= most
        assert torch.equal(quantizer.decode(codes, scale), weights)


def optimizer_grid(grid: Any) -> Quantizer:
    if isinstance(grid, float):
        return FixedGrid(grid)
    return Float8Grid() if grid == "fp8" else IntegerGrid(int(grid.removeprefix("int")))


@each_grid
def test_stochastic_rounding_is_unbiased(grid: Any) -> None:
    quantizer = grid if isinstance(grid, Quantizer) else optimizer_grid(grid)
    wanted = drawn(4, 8, seed=11)
    scale = quantizer.scale(wanted)
    generator = torch.Generator().manual_seed(0)
    count = 4000
    mean = torch.zeros_like(wanted)
    for _ in range(count):
        noise = torch.rand(wanted.shape, dtype=wanted.dtype, generator=generator)
        mean += quantizer.round(wanted, scale, noise) / count
    steps = torch.as_tensor(quantizer.steps(wanted, scale)).expand_as(wanted)
    assert ((mean - wanted).abs() < 5 * 0.5 * steps / count**0.5).all()


def test_fp8_is_torchs_e4m3() -> None:
    weights = drawn(16, 64, seed=12).float() * torch.logspace(-4, 2, 16).view(-1, 1)
    quantizer = Float8Grid()
    scale = quantizer.scale(weights)
    expected = (weights / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(quantizer.round(weights, scale), expected, rtol=1e-6, atol=0.0)


def test_special_coefficient() -> None:
    # beta = 1/2, lambda = 0: alpha = -1/eta, so the next momentum starts from M~ - E / eta.
    p = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    p.grad = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    optimizer = ECOSGD([p], lr=0.1, momentum=0.5, quantizer=0.125, rounding="rtn")
    optimizer.step()
    M = 0.5 * p.grad
    error = -0.1 * M - p.detach()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], M - error / 0.1, rtol=1e-12, atol=1e-15)


def test_frozen_scales_cut_off_what_lies_beyond_and_do_not_pile_it_up() -> None:
    p = nn.Parameter(drawn(2, 8, seed=13))
    optimizer = ECOSGD([p], lr=0.1, quantizer="int4", rounding="rtn")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.freeze_scales()
    end = (optimizer.state[p]["scale"] * 7).expand_as(p)
    for _ in range(300):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), end, rtol=1e-12, atol=0.0)
    assert float(optimizer.state[p]["exp_avg"].abs().max()) < 1.5


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    for kind in (ECOSGD, ECOAdamW):
        p = nn.Parameter(drawn(3, 3, seed=14))
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer = kind([p], lr=0.0)
        optimizer.step()
        optimizer.begin_round()
        if kind is ECOSGD:
            assert torch.isfinite(optimizer.state[p]["exp_avg"]).all()
        p.data.copy_(before)
        optimizer.step()
        assert torch.equal(p.detach(), before)


def test_vectors_are_not_rounded() -> None:
    vector = nn.Parameter(drawn(7, seed=15))
    before = vector.detach().clone()
    vector.grad = torch.ones_like(vector)
    ECOSGD([vector], lr=0.1, quantizer=0.5).step()
    torch.testing.assert_close(vector.detach(), before - 0.1 * 0.1)


def test_the_generator_can_be_given_and_is_saved() -> None:
    first, second = (nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    one = ECOSGD([first], lr=0.1, generator=torch.Generator().manual_seed(4))
    other = ECOSGD([second], lr=0.1, seed=4)
    for step in range(4):
        for p, optimizer in ((first, one), (second, other)):
            p.grad = drawn(8, 8, seed=step).float()
            optimizer.step()
    assert torch.equal(first, second)
    assert torch.equal(one.state_dict()["param_groups"][0]["rng_state"], other._generator.get_state())


@pytest.mark.parametrize("kind", [ECOSGD, ECOAdamW])
def test_a_federated_round_keeps_the_law(kind: Any) -> None:
    """What a client sends over rounds, and what its momentum holds, is the sum of its gradients' steps."""
    lr, beta, seeds = 0.1, 0.9, itertools.count()
    p = nn.Parameter(drawn(4, 6, seed=16))
    optimizer = kind([p], lr=lr, quantizer="int4")
    if kind is ECOAdamW:
        received = p.detach().clone()
        optimizer.begin_round()
        assert not torch.equal(p.detach(), received)  # On its grid, though no step's size is known.
        return
    c = lr * beta / (1 - beta)
    sent = torch.zeros_like(p).detach()
    total = torch.zeros_like(sent)
    for _ in range(5):
        p.data.copy_(drawn(4, 6, seed=next(seeds)))  # A mean of models, off the grid.
        received = p.detach().clone()
        optimizer.begin_round()
        for _ in range(3):
            p.grad = drawn(4, 6, seed=next(seeds))
            total += p.grad
            optimizer.step()
        sent += p.detach() - received
    left = -c * optimizer.state[p]["exp_avg"]
    torch.testing.assert_close(sent + left, -lr * total, rtol=0.0, atol=1e-10)


def test_stale_momentum_fades() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = ECOSGD([p], lr=0.1, quantizer=1.0, staleness=0.5)
    p.grad = torch.full((2, 2), 0.25)
    optimizer.step()
    p.data.zero_()
    before = optimizer.state[p]["exp_avg"].clone()
    optimizer.begin_round(3, 5)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], before * 0.5**3)


@pytest.mark.parametrize("kind", [ECOSGD, ECOAdamW])
@pytest.mark.parametrize(("grid", "block"), [("int8", None), ("int4", 4), ("fp8", None)])
def test_weights_in_codes_are_those_of_the_simulated_grid_to_the_bit(
    kind: Any, grid: str, block: Any
) -> None:
    layer = CodedLinear(nn.Linear(12, 6), grid, block)
    p = nn.Parameter(layer.weight)
    optimizers = [kind([q], lr=0.05, quantizer=grid, block=block) for q in (layer.handle, p)]
    for optimizer in optimizers:
        optimizer.begin_round()
    for step in range(12):
        for q, optimizer in zip((layer.handle, p), optimizers, strict=True):
            q.grad = drawn(6, 12, seed=step).float()
            optimizer.step()
        assert torch.equal(layer.weight, p)


class TestCodedLayers:
    def model(self) -> nn.Sequential:
        layers = [nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)]
        return nn.Sequential(*layers)

    def test_a_weight_is_a_byte_and_nothing_else_has_its_shape_but_the_momentum(self) -> None:
        module = self.model()
        full = sum(p.numel() for p in module.parameters())
        weights = 24 * 32 + 32 * 16
        optimizer = ECOSGD.for_module(coded_(module), lr=0.1)
        stored = sum(t.untyped_storage().nbytes() for t in module.state_dict().values())
        assert stored == weights + 4 * (32 + 16) + 4 * (full - weights)  # Codes, a scale a row, the rest.
        group = optimizer.param_groups[0]
        assert [p.shape.numel() for p in group["params"]] == [24 * 32, 32 * 16]
        assert all(p.untyped_storage().nbytes() == 4 for p in group["params"])

    @pytest.mark.parametrize("grid", ["int8", "fp8"])
    def test_gradients_are_those_of_an_ordinary_layer(self, grid: str) -> None:
        linear = nn.Linear(7, 5).double()
        layer = CodedLinear(linear, grid)
        linear.weight.data.copy_(layer.weight)
        x = [drawn(2, 3, 7, seed=0).requires_grad_() for _ in range(2)]
        y = [made(v) for made, v in zip((layer, linear), x, strict=True)]
        torch.testing.assert_close(y[0], y[1])
        for out in y:
            out.square().sum().backward()
        torch.testing.assert_close(x[0].grad, x[1].grad)
        torch.testing.assert_close(layer.handle.grad, linear.weight.grad)
        torch.testing.assert_close(layer.bias.grad, linear.bias.grad)

    def test_a_model_in_codes_trains_and_resumes(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(64, 24)
        y = (x @ torch.randn(24, 4)).argmax(dim=1)
        module = coded_(self.model())
        optimizer, losses = ECOAdamW.for_module(module, lr=0.01), []

        def steps(module: nn.Module, optimizer: Any, count: int) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(x), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))

        steps(module, optimizer, 10)
        again = copy.deepcopy(module)
        other = ECOAdamW.for_module(again, lr=0.01)
        other.load_state_dict(optimizer.state_dict())
        steps(module, optimizer, 20)
        assert losses[-1] < 0.3 * losses[0]
        steps(again, other, 20)
        for name, value in module.state_dict().items():
            assert torch.equal(value.float(), again.state_dict()[name].float()), name

    def test_grids_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="has no end"):
            CodedLinear(nn.Linear(2, 2), FixedGrid(0.5))
        layer = CodedLinear(nn.Linear(4, 2))
        layer.handle.grad = torch.ones(2, 4)
        with pytest.raises(ConfigError, match="use the same"):
            ECOSGD([layer.handle], lr=0.1, quantizer="int4").step()
