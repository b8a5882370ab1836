"""LIFT's invariants (arXiv 2506.00772), beyond those of every adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turnout.peft import Adapted, LiftAdamW, LiftConfig, attach
from turnout.peft.lift_adamw import refresh
from turnout.wire import ConfigError

M, N = 20, 30


def mask(weight: Tensor, **options: Any) -> set[int]:
    return set(LiftConfig(**options).principal(weight, "w").tolist())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(weight: Tensor, **options: Any) -> Adapted:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return attach(nn.Sequential(layer), LiftConfig(**options))


def top(values: Tensor, k: int) -> set[int]:
    return set(values.abs().reshape(-1).topk(k).indices.tolist())


def steps(adapted: Adapted, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    x = random(8, adapted.layers["0"].in_features, seed=5)
    for _ in range(count):
        optimizer.zero_grad()
        (adapted.module(x) - 1).square().mean().backward()
        optimizer.step()


def test_exactly_k_entries_change() -> None:
    weight = random(M, N)
    adapted = on(weight, r=2, filter_rank=3)
    index = adapted.shared_state()["0.lift_index"].long()
    assert len(index) == len(set(index.tolist())) == (M + N) * 2
    steps(adapted, LiftAdamW(adapted.module.parameters(), lr=0.1))
    after = adapted.layers["0"].effective_weight(torch.float32).reshape(-1)
    others = torch.ones(M * N, dtype=torch.bool)
    others[index] = False
    assert torch.equal(after[others], weight.reshape(-1)[others])
    assert bool((after[index] != weight.reshape(-1)[index]).all())


def test_at_full_rank_it_is_plain_magnitude_and_with_a_large_budget_everything() -> None:
    weight = random(M, N)
    assert mask(weight, r=2, filter_rank=M) == top(weight, 2 * (M + N))
    assert mask(weight, r=2, filter_rank=3) != top(weight, 2 * (M + N))
    assert mask(weight, r=100, filter_rank=1) == set(range(M * N))


@pytest.mark.parametrize("niter", [None, 2])
def test_with_rank_1_it_is_the_top_of_the_outer_product(niter: int | None) -> None:
    u, v = random(M, 1), random(1, N, seed=1)
    assert mask(u @ v, r=2, filter_rank=1, niter=niter) == top(u @ v, 2 * (M + N))


def test_what_is_orthogonal_and_small_is_ignored() -> None:
    q, _ = torch.linalg.qr(random(M, M, seed=2).double())
    p, _ = torch.linalg.qr(random(N, N, seed=3).double())
    low = (q[:, :3] * 10) @ p[:, :3].T
    noise = (q[:, 3:9] * 4) @ p[:, 3:9].T
    assert mask(low + noise, r=2, filter_rank=3) == top(low, 2 * (M + N))
    assert mask(low + noise, r=2, filter_rank=M) != top(low, 2 * (M + N))


def test_scaling_and_permuting_the_weight() -> None:
    weight = random(M, N)
    chosen = mask(weight, r=2, filter_rank=3)
    assert mask(7 * weight, r=2, filter_rank=3) == chosen
    rows, columns = torch.randperm(M), torch.randperm(N)
    permuted = mask(weight[rows][:, columns], r=2, filter_rank=3)
    assert {int(rows[i // N]) * N + int(columns[i % N]) for i in permuted} == chosen


def test_a_large_budget_is_dense_adamw_of_this_form() -> None:
    weight = random(M, N)
    adapted = on(weight, r=100, filter_rank=2)
    steps(adapted, LiftAdamW(adapted.module.parameters(), lr=0.05))
    dense = nn.Linear(N, M, bias=False)
    with torch.no_grad():
        dense.weight.copy_(weight)
    optimizer = LiftAdamW(dense.parameters(), lr=0.05)
    x = random(8, N, seed=5)
    for _ in range(3):
        optimizer.zero_grad()
        (dense(x) - 1).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(
        adapted.layers["0"].effective_weight(torch.float32), dense.weight, atol=1e-6, rtol=1e-5
    )


def test_epsilon_comes_before_bias_correction() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    w.grad = torch.tensor([0.5])
    LiftAdamW([w], lr=0.1, betas=(0.9, 0.95), eps=0.3, weight_decay=0.2).step()
    m, v = 0.1 * 0.5, 0.05 * 0.25
    stepped = 1.0 - 0.1 * (1 - 0.95) ** 0.5 / (1 - 0.9) * m / (v**0.5 + 0.3)
    assert w.item() == pytest.approx(stepped * (1 - 0.1 * 0.2), rel=1e-6)


def test_a_refresh_of_an_unchanged_weight_changes_nothing() -> None:
    adapted = on(random(M, N), r=2, filter_rank=3)
    optimizer = LiftAdamW(adapted.module.parameters(), lr=0.0)
    steps(adapted, optimizer)
    values = adapted.layers["0"].lift_values
    before = {k: v.clone() for k, v in optimizer.state[values].items() if isinstance(v, Tensor)}  # type: ignore[index]
    state = adapted.shared_state()
    refresh(adapted, optimizer)
    assert all(torch.equal(t, adapted.shared_state()[n]) for n, t in state.items())
    assert all(torch.equal(optimizer.state[values][k], v) for k, v in before.items())  # type: ignore[index]


def test_moments_and_changes_follow_their_entries() -> None:
    adapted = on(random(M, N), r=2, filter_rank=3)
    layer = adapted.layers["0"]
    values = layer.lift_values
    optimizer = LiftAdamW(adapted.module.parameters(), lr=0.5)
    steps(adapted, optimizer)
    old = dict(zip(layer.lift_index.tolist(), optimizer.state[values]["m"].tolist(), strict=True))  # type: ignore[index,operator]
    changes, weight = layer.delta_weight().detach(), layer.effective_weight(torch.float32).detach()
    t = optimizer.state[values]["step"]  # type: ignore[index]
    refresh(adapted, optimizer)
    assert set(layer.lift_index.tolist()) == mask(weight, r=2, filter_rank=3)  # type: ignore[operator]
    torch.testing.assert_close(layer.delta_weight(), changes, atol=0, rtol=0)
    new = dict(zip(layer.lift_index.tolist(), optimizer.state[values]["m"].tolist(), strict=True))  # type: ignore[index,operator]
    entered = set(new) - set(old)
    assert entered, "nothing entered, so nothing was tested"
    assert all(new[i] == (0.0 if i in entered else old[i]) for i in new)
    assert optimizer.state[values]["step"] == t  # type: ignore[index]
    left = set(old) - set(new)
    assert set(layer.settled_index.tolist()) == {i for i in left if changes.reshape(-1)[i] != 0}  # type: ignore[operator]


def test_the_randomised_filter_finds_what_the_exact_one_does_on_a_decaying_spectrum() -> None:
    u, v = torch.linalg.qr(random(M, M))[0], torch.linalg.qr(random(N, N, seed=1))[0]
    weight = (u * 0.4 ** torch.arange(M)) @ v[:, :M].T
    exact, quick = (mask(weight, r=2, filter_rank=3, niter=niter) for niter in (None, 3))
    assert len(exact & quick) >= 0.98 * len(exact)


def test_entries_from_the_network_are_looked_at() -> None:
    adapted = on(random(M, N), r=2, filter_rank=3)
    good = adapted.shared_state()
    index = good["0.lift_index"]
    for bad in (
        {"0.lift_index": index.flip(0)},
        {"0.lift_index": index.long()},
        {"0.lift_index": index[:-1]},
        {"0.lift_index": torch.cat([index[:-1], torch.tensor([M * N], dtype=torch.int32)])},
        {"0.settled_index": torch.tensor([3], dtype=torch.int32)},
        {
            "0.settled_index": torch.tensor([3], dtype=torch.int32),
            "0.settled_values": torch.tensor([float("nan")]),
        },
    ):
        with pytest.raises(ConfigError):
            adapted.load_shared_state({**good, **bad})


def test_bad_numbers() -> None:
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-3}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError):
            LiftAdamW([nn.Parameter(torch.zeros(1))], **options)  # type: ignore[arg-type]
    for field in ("r", "filter_rank", "update_interval", "niter"):
        with pytest.raises(ConfigError, match=field):
            LiftConfig(**{field: 0})
