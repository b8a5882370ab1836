"""AuON (arXiv 2509.24320): bounds of its one number, what it equals, and what Newton-Schulz does to it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turnout.optim import AuON, HybridAuON, newton_schulz
from turnout.optim.auon import rms_cosh

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
sizes = st.floats(1e-3, 1e3)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction(G: Tensor, kind: type[AuON] = AuON, **options: object) -> Tensor:
    """Return U of one step with gradient G, without momentum: the step divided by -lr."""
    p = nn.Parameter(torch.zeros_like(G))
    p.grad = G.clone()
    kind([p], lr=1.0, **{"momentum": 0.0, **options}).step()  # type: ignore[arg-type]
    assert torch.equal(p.grad, G), "the gradient was overwritten"
    return -p.detach()


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 999), st.sampled_from(["paper", "code"]))
def test_the_step_is_parallel_to_the_momentum(shape: tuple[int, int], seed: int, variant: str) -> None:
    G = drawn(shape, seed)
    U = direction(G, variant=variant)
    assert torch.equal(torch.sign(U), torch.sign(G))
    cosine = float((U * G).sum() / (U.norm() * G.norm()))
    assert cosine == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 999), sizes, st.sampled_from([1.0, 1.5, 3.0]))
def test_paper_ignores_the_gradients_size_and_is_bounded(
    shape: tuple[int, int], seed: int, size: float, gamma: float
) -> None:
    G = drawn(shape, seed)
    G /= G.norm()
    U = direction(G, gamma=gamma)
    torch.testing.assert_close(direction(size * G, gamma=gamma), U, rtol=2e-4, atol=0.0)
    N, slack = G.numel(), 1e-6
    length = float(U.norm())
    assert 1 / math.sqrt(1 + math.sinh(gamma) ** 2 / N) - slack <= length
    assert length <= 1 / math.sqrt(1 + gamma**2 / N) + slack
    assert float(torch.linalg.matrix_norm(U, 2)) <= 1.0


def test_the_bounds_are_reached_by_flat_and_one_hot_gradients() -> None:
    N = 16
    flat, one_hot = torch.ones(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    one_hot[1, 2] = 5.0
    # Flat entries are 1/sqrt(N) each: cosh(1/4)^2 rather than the bound's first terms.
    assert float(direction(flat).norm()) == pytest.approx(1 / math.cosh(1 / 4), rel=1e-6)
    assert float(direction(one_hot).norm()) == pytest.approx(
        1 / math.sqrt(1 + math.sinh(1) ** 2 / N), rel=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 999), sizes)
def test_code_scales_with_the_gradient(shape: tuple[int, int], seed: int, size: float) -> None:
    G = drawn(shape, seed)
    G /= G.norm()
    scaled = direction(size * G, variant="code")
    torch.testing.assert_close(scaled, size * direction(G, variant="code"), rtol=2e-4, atol=0.0)


def test_large_tensors_make_it_normalised_momentum() -> None:
    G = drawn((80, 80), 3)
    U = direction(G)
    assert float((U - G / G.norm()).norm() / U.norm()) < 1e-3
    assert float((U - G / G.norm()).norm() / U.norm()) < math.sinh(1) ** 2 / (2 * G.numel()) + 1e-6


def test_on_a_quadratic_it_follows_normalised_momentum_sgd() -> None:
    curvature = torch.linspace(0.1, 1.0, 5000, dtype=torch.float64).view(50, 100)
    start, mu, lr = drawn((50, 100), 4), 0.9, 0.3
    p, x, m = nn.Parameter(start.clone()), start.clone(), torch.zeros_like(start)
    optimizer = AuON([p], lr=lr, momentum=mu)
    for _ in range(100):
        p.grad = curvature * p.detach()
        optimizer.step()
        g = curvature * x
        m = mu * m + (1 - mu) * g
        G = (1 - mu) * g + mu * m
        x = x - lr * G / G.norm()
    assert float((p.detach() - x).norm() / x.norm()) < 1e-2
    assert float(x.norm()) < 0.8 * float(start.norm())


def test_code_without_momentum_is_sgd() -> None:
    start, targets = drawn((90, 90), 5), drawn((90, 90), 6)
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        AuON([ours], lr=0.1, momentum=0.0, variant="code"),
        torch.optim.SGD([plain], lr=0.1),
    ]
    for _ in range(20):
        for p in (ours, plain):
            p.grad = p.detach() - targets
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 999))
def test_one_newton_schulz_step_is_the_quintic_of_the_singular_values(
    shape: tuple[int, int], seed: int
) -> None:
    X = drawn(shape, seed)
    X /= X.norm()
    s = torch.linalg.svdvals(X)
    expected = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    after = torch.linalg.svdvals(newton_schulz(X, 1))
    torch.testing.assert_close(after, expected.sort(descending=True).values, rtol=1e-9, atol=1e-12)


def test_five_steps_even_out_singular_values_which_plain_auon_does_not() -> None:
    U, _, Vh = torch.linalg.svd(drawn((32, 32), 7))
    G = U @ torch.diag(torch.linspace(1.0, 0.2, 32, dtype=torch.float64)) @ Vh
    before = torch.linalg.svdvals(G)
    hybrid = torch.linalg.svdvals(direction(G, HybridAuON, ns_steps=5))
    assert float(hybrid.min()) > 0.6
    assert float(hybrid.max()) < 1.25
    plain = torch.linalg.svdvals(direction(G))
    torch.testing.assert_close(plain / plain[0], before / before[0], rtol=1e-9, atol=0.0)


def test_a_hybrid_step_divides_by_the_root_mean_square_of_cosh() -> None:
    G = drawn((6, 4), 8)
    X = newton_schulz(G / (G.norm() + 1e-7), 1)
    expected = X / (torch.cosh(X).square().mean().sqrt() + 1e-8)
    torch.testing.assert_close(direction(G, HybridAuON), expected, rtol=1e-9, atol=1e-12)


def test_zero_gradients_only_decay() -> None:
    for kind in (AuON, HybridAuON):
        p = nn.Parameter(torch.full((3, 3), 2.0))
        p.grad = torch.zeros(3, 3)
        kind([p], lr=0.5, weight_decay=0.1).step()
        assert torch.equal(p.detach(), torch.full((3, 3), 2.0 * (1 - 0.5 * 0.1)))


def test_a_parameter_can_have_its_own_share_of_decay() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.zeros(2, 2)
    p.wd_mul = 0.5  # type: ignore[attr-defined]
    AuON([p], lr=0.5, weight_decay=0.2).step()
    assert torch.equal(p.detach(), torch.full((2, 2), 1 - 0.5 * 0.2 * 0.5))


def test_momentum_is_the_papers() -> None:
    G, H, mu = drawn((4, 4), 9), drawn((4, 4), 10), 0.95
    p = nn.Parameter(torch.zeros_like(G))
    optimizer = AuON([p], lr=1.0, momentum=mu, variant="code", gamma=0.0)
    p.grad = G.clone()
    optimizer.step()
    torch.testing.assert_close(-p.detach(), (1 - mu**2) * G, rtol=1e-6, atol=1e-9)
    p.data.zero_()
    p.grad = H.clone()
    optimizer.step()
    m = mu * (1 - mu) * G + (1 - mu) * H
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], m, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(-p.detach(), (1 - mu) * H + mu * m, rtol=1e-6, atol=1e-9)


def test_other_parameters_get_adam() -> None:
    start, gradients = drawn((5,), 11), [drawn((5,), seed) for seed in range(5)]
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        AuON([ours], lr=0.3, adam_lr=0.01),
        torch.optim.Adam([plain], lr=0.01, betas=(0.8, 0.95), eps=1e-10, foreach=False),
    ]
    for g in gradients:
        for p, optimizer in zip((ours, plain), optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    assert torch.equal(ours, plain)


def test_half_precision_is_normalised_in_float32() -> None:
    G = drawn((64, 64), 12).bfloat16()
    U, exact = direction(G), direction(G.float())
    assert U.dtype == torch.bfloat16
    assert torch.equal(U, exact.bfloat16())
    assert float(rms_cosh(exact, 1.0)) > 1.0  # A mean of cosh in bfloat16 would be 1.


def test_large_gradients_do_not_overflow() -> None:
    G = torch.full((4, 4), 1e18)
    assert torch.isfinite(direction(G)).all()
    assert torch.isfinite(direction(G * 1e-30)).all()


def test_kept_momentum_fades_by_the_steps_missed() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    optimizer = AuON([p], momentum=0.5)
    optimizer.step()
    before = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.begin_round(0, 4)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], before)
    optimizer.begin_round(2, 4)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], before * 0.5**8)
