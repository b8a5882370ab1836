"""FRUGAL (arXiv 2411.07837): the split of the gradient, what is kept, and what it equals at its ends."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turnout.optim import FRUGAL
from turnout.optim.subspaces import active_tensors, choose
from turnout.wire import ConfigError

SUBSPACES = [("columns", "svd"), ("rows", "svd"), ("randk", "svd"), ("galore", "svd"), ("galore", "random")]
LR = 0.01


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(shapes: list[tuple[int, ...]], steps: int, **options: Any) -> tuple[FRUGAL, list[list[Tensor]]]:
    """Return the optimizer, and all parameters before the first step and after each."""
    params = [nn.Parameter(drawn(*shape, seed=i, dtype=torch.float32)) for i, shape in enumerate(shapes)]
    optimizer = FRUGAL(params, lr=LR, **options)
    trace = [[p.detach().clone() for p in params]]
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = drawn(*p.shape, seed=100 * step + i, dtype=torch.float32)
        optimizer.step()
        trace.append([p.detach().clone() for p in params])
    return optimizer, trace


def adamw(shapes: list[tuple[int, ...]], steps: int, gap: int | None, decay: float) -> list[list[Tensor]]:
    """Return the trajectory of torch's AdamW, started anew every ``gap`` steps."""
    params = [nn.Parameter(drawn(*shape, seed=i, dtype=torch.float32)) for i, shape in enumerate(shapes)]
    trace = [[p.detach().clone() for p in params]]
    for step in range(steps):
        if step == 0 or (gap and step % gap == 0):
            optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=decay, foreach=False)
        for i, p in enumerate(params):
            p.grad = drawn(*p.shape, seed=100 * step + i, dtype=torch.float32)
        optimizer.step()
        trace.append([p.detach().clone() for p in params])
    return trace


@pytest.mark.parametrize("projector", ["block", "randk", "columns", "rows"])
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_full_density_is_adamw_to_the_bit(projector: str, reset: bool, decay: float) -> None:
    shapes, steps, gap = [(8, 16), (4, 8)], 12, 5
    _, ours = run(
        shapes,
        steps,
        density=1.0,
        update_gap=gap,
        projector=projector,
        reset_statistics=reset,
        weight_decay=decay,
    )
    theirs = adamw(shapes, steps, gap if reset else None, decay)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("projector", ["block", "columns", "rows", "randk", "galore"])
@pytest.mark.parametrize("rule", ["sgd", "sign_sgd", "no"])
def test_no_density_is_the_state_free_rule(projector: str, rule: str) -> None:
    _, trace = run([(6, 4)], 4, density=0.0, projector=projector, inactive_rule=rule)
    x = trace[0][0].clone()
    for step in range(4):
        g = drawn(6, 4, seed=100 * step, dtype=torch.float32)
        x.add_({"sgd": g, "sign_sgd": g.sign(), "no": g * 0}[rule], alpha=-LR)
        torch.testing.assert_close(trace[step + 1][0], x, rtol=0.0, atol=1e-7)


def test_block_without_a_rule_for_the_rest_trains_one_block_at_a_time() -> None:
    """As BAdam does."""
    shapes = [(3, 3)] * 4
    _, trace = run(shapes, 8, density=0.25, update_gap=2, block_order="ascending", inactive_rule="no")
    for step in range(8):
        moved = [not torch.equal(a, b) for a, b in zip(trace[step], trace[step + 1], strict=True)]
        assert moved == [i == step // 2 for i in range(4)]


def test_galore_is_what_is_left_without_a_rule_for_the_rest() -> None:
    """Adam on the gradient's projection onto its leading singular vectors, moments kept: GaLore."""
    shape, k, gap = (10, 6), 3, 4
    _, trace = run(
        [shape],
        10,
        density=0.5,
        update_gap=gap,
        projector="galore",
        inactive_rule="no",
        reset_statistics=False,
    )
    x = trace[0][0].double()
    m = v = torch.zeros(10, k, dtype=torch.float64)
    for step in range(10):
        G = drawn(*shape, seed=100 * step)
        if step % gap == 0:
            B = torch.linalg.svd(G, full_matrices=False).Vh[:k]
            B_32 = torch.linalg.svd(G.float(), full_matrices=False).Vh[:k]
            B *= torch.sign((B * B_32).sum(dim=1, keepdim=True))  # The sign of a singular vector is free.
        low = G @ B.mT
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        t = step + 1
        x = x - LR * (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)) @ B
        torch.testing.assert_close(trace[step + 1][0].double(), x, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SUBSPACES),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
def test_projection_and_residual_make_up_the_gradient(
    kind: tuple[Any, Any], shape: tuple[int, int], density: float, seed: int
) -> None:
    G = drawn(*shape, seed=seed)
    subspace = choose(kind[0], G, density, kind[1], (seed, 0, 0))
    low = subspace.project(G)
    lifted = subspace.lift(low, G.shape)
    rest = subspace.clear(G.clone())
    torch.testing.assert_close(lifted + rest, G)
    assert float((lifted * rest).sum().abs()) < 1e-9
    torch.testing.assert_close(subspace.project(lifted), low)
    torch.testing.assert_close(subspace.project(rest), torch.zeros_like(low), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("projector", ["block", "columns", "rows", "randk"])
@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (0.5, 0.1)])
def test_each_inactive_entry_moves_by_one_size(projector: str, scale: float, factor: float) -> None:
    optimizer, trace = run(
        [(8, 8), (8, 8)],
        5,
        density=0.5,
        projector=projector,
        inactive_lr_scale=factor,
        proj_lr_scale=scale,
    )
    size = LR * scale * factor
    inactive = 0
    for before, after in itertools.pairwise(trace[1:]):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            moved = (b - a).abs()
            inactive += int(((moved - size).abs() < 1e-6).sum())
            p = optimizer.param_groups[0]["params"][i]
            if projector == "block" and "exp_avg" not in optimizer.state[p]:
                assert ((moved - size).abs() < 1e-6).all()
    assert inactive >= 4 * 64


def test_zero_gradients_do_not_move_inactive_entries() -> None:
    p = nn.Parameter(torch.ones(4, 8))
    optimizer = FRUGAL([p], lr=LR, projector="columns", density=0.25)
    p.grad = torch.zeros(4, 8)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4, 8))


def stored(optimizer: FRUGAL) -> dict[tuple[int, ...], int]:
    shapes: dict[tuple[int, ...], int] = {}
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                shapes[tuple(state[key].shape)] = shapes.get(tuple(state[key].shape), 0) + 1
    return shapes


@pytest.mark.parametrize(
    ("projector", "density", "shapes", "expected"),
    [
        ("columns", 0.3, [(5, 11)], {(5, 3): 2}),
        ("rows", 0.3, [(11, 5)], {(3, 5): 2}),
        ("randk", 0.25, [(5, 7)], {(8,): 2}),
        ("galore", 0.3, [(11, 7)], {(11, 2): 2}),
        ("galore", 0.3, [(7, 11)], {(2, 11): 2}),
        ("block", 0.5, [(3, 3)] * 5, {(3, 3): 4}),
        ("block", 0.3, [(3, 3)] * 5, {(3, 3): 4}),
        ("columns", 0.5, [(4, 6), (9,)], {(4, 3): 2, (9,): 2}),
    ],
)
def test_state_is_kept_for_the_active_part_only(
    projector: str, density: float, shapes: Any, expected: Any
) -> None:
    optimizer, _ = run(shapes, 7, density=density, projector=projector, update_gap=3)
    assert stored(optimizer) == expected


@pytest.mark.parametrize("order", ["descending", "ascending", "random", "mirror"])
@pytest.mark.parametrize(("count", "density"), [(8, 0.25), (6, 1 / 3), (6, 1.0)])
def test_every_tensor_has_its_turn_once_in_a_pass(order: Any, count: int, density: float) -> None:
    active = round(density * count)
    windows = count // active
    for turn in range(3):
        seen = [
            i
            for window in range(turn * windows, (turn + 1) * windows)
            for i in active_tensors(count, density, order, 7, window)
        ]
        assert sorted(seen) == list(range(count))


def test_orders_are_what_they_are_called() -> None:
    assert [sorted(active_tensors(6, 1 / 3, "descending", 0, w)) for w in range(3)] == [
        [4, 5],
        [2, 3],
        [0, 1],
    ]
    assert [sorted(active_tensors(6, 1 / 3, "mirror", 0, w)) for w in range(3)] == [[0, 5], [1, 4], [2, 3]]
    shuffled = {tuple(active_tensors(6, 1 / 3, "random", 0, w)) for w in range(9)}
    assert len(shuffled) > 3
    with pytest.raises(ConfigError, match="takes pairs"):
        active_tensors(6, 0.5, "mirror", 0, 0)


@pytest.mark.parametrize("projector", ["block", "columns", "rows", "randk", "galore"])
def test_equal_seeds_choose_equal_subspaces_on_different_data(projector: str) -> None:
    def chosen(seed: int, data: int) -> list[Any]:
        params = [nn.Parameter(drawn(8, 6, seed=data + i)) for i in range(4)]
        optimizer = FRUGAL(
            params, density=0.5, update_gap=1, projector=projector, galore_basis="random", seed=seed
        )
        sets: list[Any] = []
        for step in range(3):
            for p in params:
                p.grad = drawn(8, 6, seed=data + step)
            optimizer.step()
            for p in params:
                state = optimizer.state[p]
                held = state.get("index", state.get("basis"))
                sets.append("exp_avg" in state if held is None else held.numpy().tolist())
        return sets

    assert chosen(1, 0) == chosen(1, 50)
    assert chosen(1, 0) != chosen(2, 0)


def test_the_update_has_full_rank_only_with_a_rule_for_the_rest() -> None:
    def rank(rule: str) -> int:
        _, trace = run([(12, 12)], 1, density=0.25, projector="galore", inactive_rule=rule)
        return int(torch.linalg.matrix_rank((trace[1][0] - trace[0][0]).double(), rtol=1e-4))

    assert rank("no") == 3
    assert rank("sign_sgd") == 12


def test_the_subspace_changes_on_time_even_for_tensors_without_gradients() -> None:
    """The count is the group's: no tensor's own absence holds the others up."""
    first, second = (nn.Parameter(drawn(4, 8, seed=i)) for i in range(2))
    optimizer = FRUGAL([first, second], projector="columns", density=0.5, update_gap=2)
    windows = []
    for step in range(6):
        first.grad = None if step < 3 else drawn(4, 8, seed=step)
        second.grad = drawn(4, 8, seed=step)
        optimizer.step()
        windows.append(int(optimizer.state[second]["window"]))
    assert windows == [0, 0, 1, 1, 2, 2]
    assert int(optimizer.state[first]["window"]) == 2


def test_columns_that_stay_active_keep_their_moments_if_asked() -> None:
    p = nn.Parameter(drawn(3, 10, seed=0))
    optimizer = FRUGAL([p], projector="columns", density=0.7, update_gap=1, reset_statistics=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    old = set(optimizer.state[p]["index"].tolist())
    p.grad = torch.zeros_like(p)
    optimizer.step()
    index, moment = optimizer.state[p]["index"].tolist(), optimizer.state[p]["exp_avg"]
    assert 0 < len(old & set(index)) < 7
    for column, held in zip(index, moment.T, strict=True):
        assert bool(held.any()) == (column in old)


def test_sgdm_starts_from_zero_momentum_and_lion_moves_by_signs() -> None:
    _, trace = run([(6, 6)], 1, density=1.0, projector="columns", state_full="sgdm")
    g = drawn(6, 6, seed=0, dtype=torch.float32)
    torch.testing.assert_close(trace[1][0], trace[0][0] - LR * g)
    _, trace = run([(6, 6)], 2, density=1.0, projector="columns", state_full="lion")
    moved = np.abs((trace[2][0] - trace[1][0]).numpy())
    np.testing.assert_allclose(moved, LR, rtol=1e-3)


@pytest.mark.parametrize("projector", ["block", "columns", "rows", "randk", "galore"])
@pytest.mark.parametrize("reset", [True, False])
def test_sent_state_continues_where_it_was(projector: str, reset: bool) -> None:
    """A client that adopts exactly what another one exported takes the same next steps."""
    shapes, options = [(6, 8), (8, 6), (5,)], {"density": 0.5, "update_gap": 4, "projector": projector}
    optimizer, _ = run(shapes, 10, galore_basis="random", reset_statistics=reset, **options)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = FRUGAL(copies, lr=LR, galore_basis="random", reset_statistics=reset, **options)
    for p, q in zip(params, copies, strict=True):
        zero = {key: torch.zeros_like(p) for key in other.carried}
        other.adopt(q, {**zero, **optimizer.export(p)}, 10)
    if projector == "block" and not reset:
        return  # How long a tensor has been active is not sent.
    for step in range(10, 16):
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            p.grad = drawn(*p.shape, seed=100 * step + i, dtype=torch.float32)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p, q)
