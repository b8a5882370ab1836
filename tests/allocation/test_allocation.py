"""Budgets, shares and layers as the server decides them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.allocation import (
    AdaLoraAllocator,
    CubicSchedule,
    IstAllocator,
    ModelView,
    SnellaAllocator,
    centred_rewards,
    draw_layers,
    keep_top,
    score_change,
    share_out,
)
from turnout.wire import ConfigError


def test_the_budget_falls_from_start_to_end() -> None:
    schedule = CubicSchedule(48, 12, tinit=60, tfinal=240, total_step=600)
    budgets = [schedule.budget(step) for step in range(1, 601)]
    assert set(budgets[:60]) == {48}
    assert set(budgets[360:]) == {12}
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))
    # Half-way down, an eighth of the way is left.
    assert schedule.budget(210) == int(12 + 36 / 8)


@pytest.mark.parametrize(("tinit", "tfinal", "total"), [(10, 10, 20), (0, 5, 5), (-1, 0, 5), (0, -1, 5)])
def test_a_schedule_without_a_way_down_is_refused(tinit: int, tfinal: int, total: int) -> None:
    with pytest.raises(ConfigError, match="tinit"):
        CubicSchedule(8, 4, tinit, tfinal, total)


def test_exactly_the_budget_is_kept_whatever_ties() -> None:
    assert keep_top(np.zeros(6), 4).tolist() == [True] * 4 + [False] * 2
    assert keep_top(np.array([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [False, True, True, False]
    assert not keep_top(np.ones(3), 0).any()
    assert keep_top(np.ones(3), 3).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 400)), min_size=1, max_size=8),
    st.floats(0, 1.2),
)
def test_shares_sum_to_the_budget_within_their_caps(layers: list[tuple[float, int]], part: float) -> None:
    scores, caps = np.array([s for s, _ in layers]), np.array([c for _, c in layers])
    budget = int(part * caps.sum())
    shares = share_out(budget, scores, caps)
    assert shares.sum() == min(budget, caps.sum())
    assert (shares >= 0).all()
    assert (shares <= caps).all()


def test_shares_follow_the_scores() -> None:
    caps = np.full(4, 100)
    shares = share_out(100, np.array([1.0, 2.0, 3.0, 4.0]), caps)
    assert shares.tolist() == [10, 20, 30, 40]
    assert share_out(100, np.zeros(4), caps).tolist() == [25] * 4
    # One layer is full: what it cannot take goes to the others, all of it.
    assert share_out(250, np.array([1.0, 0.0, 0.0, 0.0]), caps).tolist() == [100, 50, 50, 50]


def layers(r: int = 4, count: int = 3) -> ModelView:
    generator = np.random.default_rng(0)
    tensors, buffers = {}, {}
    for k in range(count):
        tensors[f"{k}.lora_A"] = generator.standard_normal((r, 5)).astype(np.float32)
        tensors[f"{k}.lora_B"] = generator.standard_normal((6, r)).astype(np.float32)
        tensors[f"{k}.lora_E"] = np.ones((r, 1), np.float32)
        buffers[f"{k}.running_importance"] = generator.random(r)
        buffers[f"{k}.rank_mask"] = np.ones(r, np.uint8)
    return ModelView(tensors, buffers)


def rank(model: ModelView) -> int:
    return sum(int((value != 0).sum()) for _, value in model.ending("lora_E"))


def test_adalora_keeps_the_budget_of_every_round_and_fixes_the_mask_at_the_end() -> None:
    model = layers()
    allocator = AdaLoraAllocator(
        init_r=4, target_r=1, tinit=10, tfinal=20, deltaT=5, total_step=100, local_steps=5
    )
    schedule = allocator.schedule(3)
    allocator.allocate(0, model)
    assert rank(model) == 12
    for server_round in range(1, 17):
        for _, value in model.ending("lora_E"):
            value[...] = 1.0  # Clients may bring any of them back.
        allocator.allocate(server_round, model)
        assert rank(model) == schedule.budget(5 * server_round)
    assert all(mask.all() for _, mask in model.ending("rank_mask"))  # Not yet: step 80 is 100 - 20.
    allocator.allocate(17, model)
    fixed = {prefix: mask.copy() for prefix, mask in model.ending("rank_mask")}
    assert sum(int(mask.sum()) for mask in fixed.values()) == 3 == rank(model)
    for _, score in model.ending("running_importance"):
        score[...] = score[::-1].copy()
    for _, value in model.ending("lora_E"):
        value[...] = 1.0
    allocator.allocate(18, model)
    assert all((mask == fixed[prefix]).all() for prefix, mask in model.ending("rank_mask"))
    assert rank(model) == 3
    for prefix, value in model.ending("lora_E"):
        assert ((value[:, 0] != 0) == fixed[prefix].astype(bool)).all()


def test_adalora_keeps_the_best_triplets_of_all_layers() -> None:
    model = layers()
    for (_, score), best in zip(model.ending("running_importance"), (9.0, 0.0, 0.0), strict=True):
        score += best
    AdaLoraAllocator(init_r=4, target_r=1, total_step=10, tfinal=5, local_steps=6).allocate(1, model)
    assert [int((value != 0).sum()) for _, value in model.ending("lora_E")] == [3, 0, 0]


def test_of_decomposed_triplets_each_layer_keeps_its_largest() -> None:
    model = layers()
    scored = dict(model.ending("running_importance"))
    for (_, score), best in zip(scored.items(), (9.0, 5.0, 0.0), strict=True):
        score[:] = [best, best, 0.0, 0.0]
    for _, value in model.ending("lora_E"):
        value[:, 0] = [1.0, -2.0, 3.0, -4.0]
    settings = {"init_r": 4, "target_r": 1, "total_step": 10, "tfinal": 5, "local_steps": 6}
    allocator = AdaLoraAllocator(**settings, largest=True)
    allocator.allocate(1, model)
    kept = [value[:, 0].tolist() for _, value in model.ending("lora_E")]
    assert kept == [[0, 0, 3, -4], [0, 0, 0, -4], [0, 0, 0, 0]]
    # In the last phase ranks stay; places follow the server's next decomposition, and the mask with them.
    for _, value in model.ending("lora_E"):
        value[:, 0] = [9.0, 1.0, 0.5, 2.0]
    allocator.allocate(2, model)
    assert [mask.tolist() for _, mask in model.ending("rank_mask")] == [[1, 0, 0, 1], [1, 0, 0, 0], [0] * 4]
    assert next(value[:, 0].tolist() for _, value in model.ending("lora_E")) == [9, 0, 0, 2]


def test_equal_ranks_prune_nothing() -> None:
    model = layers()
    for server_round in range(5):
        AdaLoraAllocator(init_r=4, target_r=4, total_step=10, local_steps=3).allocate(server_round, model)
    assert rank(model) == 12


@pytest.mark.parametrize("kind", [AdaLoraAllocator, SnellaAllocator])
def test_a_schedule_in_steps_needs_local_steps(kind: Any) -> None:
    with pytest.raises(ConfigError, match="local_steps"):
        kind(total_step=10, local_steps=None)


def test_snella_shares_out_a_falling_budget() -> None:
    tensors = {
        f"{k}.{name}": np.zeros((2, size, 3), np.float32)
        for k, shape in enumerate([(8, 4), (8, 16)])
        for name, size in zip(("In_Qs", "Out_Qs"), shape, strict=True)
    }
    buffers = {f"{k}.num_kept": np.array([0]) for k in range(2)}
    buffers |= {f"{k}.running_importance": np.zeros(1, np.float32) for k in range(2)}
    model = ModelView(tensors, buffers)
    allocator = SnellaAllocator(
        init_sparsity=0.0, target_sparsity=0.9, tfinal=30, total_step=100, local_steps=10
    )
    allocator.allocate(0, model)
    assert [int(kept[0]) for _, kept in model.ending("num_kept")] == [32, 128]  # Dense: all may be non-zero.
    model.buffers["1.running_importance"][...] = 3.0
    model.buffers["0.running_importance"][...] = 1.0
    for server_round in range(1, 9):
        allocator.allocate(server_round, model)
        kept = [int(value[0]) for _, value in model.ending("num_kept")]
        assert sum(kept) == allocator.schedule(160).budget(10 * server_round)
    assert kept == [4, 12]
    model.buffers["0.running_importance"][...] = 9.0
    allocator.allocate(9, model)
    assert [
        int(value[0]) for _, value in model.ending("num_kept")
    ] == kept  # The last phase allocates nothing.


def test_rewards_are_centred_and_equal_losses_change_nothing() -> None:
    losses = np.array([0.3, 2.0, 7.0])
    assert abs(centred_rewards(losses).sum()) < 1e-15
    probes = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    q = np.array([0.0, 1.0, -2.0, 40.0])
    assert np.allclose(score_change(q, probes, np.full(3, 1.7), 10.0), 0, atol=1e-15)
    change = score_change(q, probes, losses, 10.0)
    bound = 10.0 * 3 * 0.25 * np.abs(centred_rewards(losses)).max()
    assert np.abs(change).max() <= bound
    # Layer 0 was damped only where the loss came out lowest: damping it helps, so it counts as unimportant.
    assert change[0] > 0 > change[3]


def test_layers_with_high_scores_are_drawn_less() -> None:
    q = np.array([3.0, 0.0, -3.0])
    drawn = [draw_layers(-q, 1, np.random.default_rng(seed))[0] for seed in range(300)]
    counts = np.bincount(drawn, minlength=3)
    assert counts[0] < counts[1] < counts[2]
    assert draw_layers(np.array([99.0, -99.0]), 2, np.random.default_rng(0)).tolist() == [0, 1]


def test_ist_draws_the_same_layers_for_equal_seeds_and_others_each_round() -> None:
    def run(seed: int) -> list[list[int]]:
        model = ModelView(
            {}, {"ist.running_scores": np.zeros(8, np.float32), "ist.active": np.ones(8, np.uint8)}
        )
        chosen = []
        for server_round in range(6):
            IstAllocator(seed=seed).allocate(server_round, model)
            chosen.append(np.flatnonzero(model.buffers["ist.active"]).tolist())
        return chosen

    first = run(3)
    assert first == run(3) != run(4)
    assert {len(layers) for layers in first} == {2}
    assert len({tuple(layers) for layers in first}) > 1


def test_ist_in_local_mode_decides_nothing() -> None:
    active = np.ones(4, np.uint8)
    model = ModelView({}, {"running_scores": np.full(4, 99.0, np.float32), "active": active})
    IstAllocator(mode="local").allocate(1, model)
    assert model.buffers["active"] is active
    assert model.buffers["running_scores"].max() == 30
