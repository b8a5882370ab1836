"""CLASSP (arXiv 2405.09637): the mask of each weight, the accumulator, and what it equals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turnout.optim import CLASSP
from turnout.wire import ConfigError

powers = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0])


def drawn(seed: int, count: int = 30) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(gradients: list[Tensor], **options: object) -> tuple[nn.Parameter, CLASSP, list[Tensor]]:
    """Return a parameter after steps with ``gradients``, its optimizer and its values on the way."""
    p = nn.Parameter(drawn(99, gradients[0].numel()))
    optimizer = CLASSP([p], **options)  # type: ignore[arg-type]
    trace = [p.detach().clone()]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        trace.append(p.detach().clone())
    return p, optimizer, trace


def test_power_two_without_threshold_is_adagrad_with_eps_inside_the_root() -> None:
    gradients, lr, eps = [drawn(seed) for seed in range(20)], 0.1, 1e-5
    p, _, _ = stepped(gradients, lr=lr, threshold=0.0, power=2.0, eps=eps)
    # torch's Adagrad has eps outside: with eps=0 and its sum started at eps, it is inside.
    q = nn.Parameter(drawn(99))
    adagrad = torch.optim.Adagrad([q], lr=lr, eps=0.0, initial_accumulator_value=eps)
    for g in gradients:
        q.grad = g.clone()
        adagrad.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_without_threshold_and_scaling_it_is_sgd() -> None:
    gradients = [drawn(seed) for seed in range(10)]
    p, optimizer, _ = stepped(gradients, lr=0.1, threshold=0.0, apply_scaling=False)
    q = nn.Parameter(drawn(99))
    sgd = torch.optim.SGD([q], lr=0.1)
    for g in gradients:
        q.grad = g.clone()
        sgd.step()
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["grad_sum"], sum(g.abs() for g in gradients))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), powers, st.floats(0.0, 2.0))
def test_accumulator_grows_and_steps_shrink(seeds: list[int], power: float, threshold: float) -> None:
    gradients, lr, eps = [drawn(seed) for seed in seeds], 0.1, 1e-4
    p, optimizer, trace = stepped(gradients, lr=lr, threshold=threshold, power=power, eps=eps)
    total = torch.zeros_like(p)
    rate = torch.full_like(p, float("inf"))
    for g, before, after in zip(gradients, trace[:-1], trace[1:], strict=True):
        mask = g * g > threshold
        grown = total + mask * g.abs() ** power
        assert (grown >= total).all()
        total = grown
        now = lr / (eps + total) ** (1 / power)
        assert (now <= rate).all()
        rate = now
        torch.testing.assert_close(after, before - mask * now * g, rtol=1e-9, atol=1e-12)
        if power == 1.0:
            assert ((after - before).abs() <= lr * (1 + 1e-12)).all()
    torch.testing.assert_close(optimizer.state[p]["grad_sum"], total.detach(), rtol=1e-9, atol=1e-12)


def test_a_threshold_above_every_gradient_changes_nothing() -> None:
    gradients = [drawn(seed) for seed in range(3)]
    most = max(float((g * g).max()) for g in gradients)
    p, optimizer, trace = stepped(gradients, threshold=most)
    assert torch.equal(p.detach(), trace[0])
    assert not optimizer.state[p]["grad_sum"].any()


def test_weights_that_never_pass_the_mask_keep_their_bits_even_with_decay() -> None:
    gradients = [drawn(seed) for seed in range(3)]
    untouched = torch.stack([g * g <= 1.0 for g in gradients]).all(dim=0)
    assert 0 < int(untouched.sum()) < 30
    p, _, trace = stepped(gradients, threshold=1.0, weight_decay=0.1)
    assert torch.equal(p.detach()[untouched], trace[0][untouched])
    assert (p.detach()[~untouched] != trace[0][~untouched]).all()


def test_groups_use_their_own_settings() -> None:
    slow, fast, deaf = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = CLASSP(
        [{"params": [slow]}, {"params": [fast], "lr": 0.4}, {"params": [deaf], "threshold": 9.0}],
        lr=0.1,
        threshold=0.0,
        eps=1e-9,
    )
    for p in (slow, fast, deaf):
        p.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(slow.detach(), torch.full((3,), -0.1))
    torch.testing.assert_close(fast.detach(), torch.full((3,), -0.4))
    assert not deaf.detach().any()


def test_legacy_does_as_the_authors_code() -> None:
    gradients = [drawn(seed) for seed in range(4)]
    # The power is without effect on the sum ...
    p, optimizer, _ = stepped(gradients, legacy=True, power=2.0, threshold=0.5)
    torch.testing.assert_close(optimizer.state[p]["grad_sum"], sum(g.abs() for g in gradients))
    # ... and the threshold is one for the whole tensor, a truth value: 1 or more stops everything.
    still, _, trace = stepped(gradients, legacy=True, threshold=1.0)
    assert torch.equal(still.detach(), trace[0])


def test_the_first_step_of_power_one_is_about_the_learning_rate() -> None:
    g, lr, eps = drawn(3), 0.2, 1e-5
    _, _, (before, after) = stepped([g], lr=lr, threshold=0.0, eps=eps)
    torch.testing.assert_close((after - before).abs(), lr * g.abs() / (eps + g.abs()), rtol=1e-9, atol=1e-12)


def test_density_lets_that_share_pass() -> None:
    _, optimizer, trace = stepped([drawn(1, 200)], density=0.1, count_active=True)
    assert int((trace[1] != trace[0]).sum()) == 20
    assert optimizer.mask_density() == pytest.approx(0.1)


def test_density_never_moves_a_weight_without_gradient() -> None:
    g = torch.zeros(50, dtype=torch.float64)
    g[3] = 1.0
    _, _, trace = stepped([g], density=0.5)
    assert (trace[1] != trace[0]).nonzero().flatten().tolist() == [3]


def test_a_frozen_accumulator_stays_and_survives_a_checkpoint() -> None:
    p, optimizer, _ = stepped([drawn(0)], threshold=0.0)
    held = optimizer.state[p]["grad_sum"].clone()
    assert optimizer.average_grad_sum() == pytest.approx(float(held.mean()))
    optimizer.freeze_accumulator()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["grad_sum"], held)
    other = CLASSP([p], threshold=0.0)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert torch.equal(other.state[p]["grad_sum"], held)
    other.freeze_accumulator(False)
    other.step()
    assert (other.state[p]["grad_sum"] > held).all()


def test_density_of_the_mask_needs_counting() -> None:
    _, optimizer, _ = stepped([drawn(0)])
    with pytest.raises(ConfigError, match="count_active=True"):
        optimizer.mask_density()


def test_small_gradients_in_half_precision_are_accumulated_in_float32() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = CLASSP([p], threshold=0.0, power=2.0)
    for _ in range(4):
        p.grad = torch.full((3,), 1e-5, dtype=torch.float16)  # Its square is below float16's least number.
        optimizer.step()
    square = float(torch.tensor(1e-5, dtype=torch.float16)) ** 2
    torch.testing.assert_close(optimizer.state[p]["grad_sum"], torch.full((3,), 4 * square))


def test_unused_embedding_rows_never_accumulate() -> None:
    layer = nn.Embedding(6, 3)
    optimizer = CLASSP(layer.parameters(), threshold=0.0)
    before = layer.weight.detach().clone()
    layer(torch.tensor([1, 4])).square().sum().backward()
    optimizer.step()
    rows = [0, 2, 3, 5]
    assert torch.equal(layer.weight.detach()[rows], before[rows])
    assert not optimizer.state[layer.weight]["grad_sum"][rows].any()
