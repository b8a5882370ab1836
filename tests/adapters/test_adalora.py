"""AdaLoRA's invariants: scores, penalty, pruning beside an ordinary loop (the schedule: tests/allocation)."""

from __future__ import annotations

import pytest
import torch
from adapter_rows import SIDES, shake
from torch import nn

from turnout.peft import AdaLoraConfig, attach
from turnout.peft.adalora import AdaLora
from turnout.peft.allocating import update_and_allocate
from turnout.peft.sensitivity import Sensitivity
from turnout.wire import ConfigError


def test_a_constant_gradient_makes_the_score_certain() -> None:
    weight, gradient = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0])
    sensitivity = Sensitivity(weight, 0.85, 0.85)
    for _ in range(200):
        sensitivity.update(weight, gradient)
    torch.testing.assert_close(sensitivity.mean, torch.tensor([1.0, 3.0]))
    assert sensitivity.uncertainty.max() < 1e-6
    sensitivity.update(weight, torch.tensor([float("nan"), 1.0]))
    assert torch.isfinite(sensitivity.score()).all()


def test_the_score_uses_the_new_mean() -> None:
    weight, gradient = torch.tensor([1.0]), torch.tensor([4.0])
    sensitivity = Sensitivity(weight, 0.75, 0.5)
    sensitivity.update(weight, gradient)
    assert sensitivity.mean.item() == pytest.approx(1.0)
    assert sensitivity.uncertainty.item() == pytest.approx(0.5 * 3.0)


def test_the_scale_does_not_follow_the_rank() -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=9)
    assert config.scale == pytest.approx(2.0, rel=1e-5)
    layer = AdaLora(nn.Linear(*reversed(SIDES)), config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_E.fill_(1.0)
    whole = layer.delta_weight()
    layer.rank_mask[2:] = 0
    half = layer.delta_weight()
    expected = config.scale * layer.lora_B[:, :2] @ layer.lora_A[:2]
    torch.testing.assert_close(half, expected)
    assert torch.linalg.matrix_rank(half) == 2 < torch.linalg.matrix_rank(whole) == 4
    assert layer.kept().tolist() == [True, True, False, False]


def test_the_penalty_is_the_mean_distance_from_orthonormal() -> None:
    adapted = attach(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)),
        AdaLoraConfig(init_r=3, target_r=1, total_step=9, orth_reg_weight=0.5),
    )
    norms = []
    for layer in adapted.layers.values():
        assert isinstance(layer, AdaLora)
        matrices = (layer.lora_A.detach(), layer.lora_B.detach().T)
        norms += [float((m @ m.T - torch.eye(3)).norm()) for m in matrices]
    penalties = [layer.penalty() for layer in adapted.layers.values()]  # type: ignore[operator]
    assert float(sum(penalties).detach()) == pytest.approx(0.5 * sum(norms) / 4, rel=1e-5)
    layer.rank_mask[0] = 0  # Of the triplets that are left only.
    a, b = layer.lora_A[1:].detach(), layer.lora_B[:, 1:].detach().T
    norms[2:] = [float((m @ m.T - torch.eye(2)).norm()) for m in (a, b)]
    left = float(layer.penalty().detach())  # type: ignore[operator]
    assert left == pytest.approx(0.5 * sum(norms[2:]) / 4, rel=1e-5)
    nn.init.orthogonal_(layer.lora_A)  # type: ignore[arg-type]
    nn.init.orthogonal_(layer.lora_B)  # type: ignore[arg-type]
    assert float(layer.penalty().detach()) < 1e-5  # type: ignore[operator]


def test_without_pruning_it_is_an_adapter_of_fixed_rank() -> None:
    config = AdaLoraConfig(init_r=2, target_r=2, total_step=9, orth_reg_weight=0.0, lora_alpha=2)
    adapted = attach(nn.Sequential(nn.Linear(6, 5)), config)
    shake(adapted)
    (layer,) = adapted.layers.values()
    assert isinstance(layer, AdaLora)
    before = layer.delta_weight()
    for step in range(1, 10):
        update_and_allocate(adapted, step)
    assert torch.equal(layer.delta_weight(), before)
    p, e, q = layer.lora_B, torch.diag(layer.lora_E[:, 0]), layer.lora_A
    torch.testing.assert_close(before, p @ e @ q, atol=1e-4, rtol=1e-4)
    assert layer.penalty() is None


def test_of_common_vectors_the_mean_of_singular_values_is_exact() -> None:
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, init_std=0.5)
    generator = torch.Generator().manual_seed(0)
    layer = AdaLora(nn.Linear(*reversed(SIDES)), config, torch.Generator().manual_seed(1))
    values = [torch.randn(3, 1, generator=generator) for _ in range(3)]
    deltas = []
    for value in (*values, sum(values) / 3):
        with torch.no_grad():
            layer.lora_E.copy_(value)  # type: ignore[arg-type]
            deltas.append(layer.delta_weight())
    torch.testing.assert_close(deltas[3], sum(deltas[:3]) / 3)


def test_an_ordinary_loop_ends_within_the_budget() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    config = AdaLoraConfig(init_r=4, target_r=1, tinit=3, tfinal=10, total_step=40, init_std=0.3)
    adapted = attach(module, config)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.03)
    x, y = torch.randn(32, 8), torch.randn(32, 8)
    counts = []
    for step in range(1, 41):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
        update_and_allocate(adapted, step)
        kept = {name: layer.kept() for name, layer in adapted.layers.items()}  # type: ignore[operator]
        counts.append(int(sum(int(k.sum()) for k in kept.values())))
    schedule = config.allocator().schedule(2)
    assert all(count <= schedule.budget(step) for step, count in enumerate(counts, start=1))
    assert counts[-1] == 2
    # The last phase holds the mask whatever the optimizer does to E.
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.lora_E.fill_(1.0)  # type: ignore[union-attr,operator]
    assert sum(int(layer.kept().sum()) for layer in adapted.layers.values()) == 2  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tinit": 5, "tfinal": 5}, "tinit=5"),
        ({"beta1": 1.0}, "beta1"),
        ({"orth_reg_weight": -1}, "orth_reg_weight"),
        ({"init_r": 0}, "init_r"),
    ],
)
def test_bad_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig(total_step=10, **options)  # type: ignore[arg-type]


def test_what_the_mask_drops_is_as_it_was_after_training() -> None:
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=9)
    (layer,) = attach(nn.Sequential(nn.Linear(8, 6)), config).layers.values()
    assert isinstance(layer, AdaLora)
    layer.rank_mask.copy_(torch.tensor([0, 1, 0]))
    with torch.no_grad():
        layer.lora_E.fill_(0.5)
    before = [t.detach().clone() for t in (layer.lora_A, layer.lora_B, layer.lora_E)]
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B, layer.lora_E], lr=0.1, weight_decay=0.1)
    layer.start_training(1, (0,))
    for _ in range(2):
        optimizer.zero_grad()
        (layer(torch.randn(4, 8)).square().mean() + layer.penalty()).backward()
        optimizer.step()
        layer.after_gradient()
    layer.end_training()
    for tensor, old, side in zip((layer.lora_A, layer.lora_B, layer.lora_E), before, (0, 1, 0), strict=True):
        kept, dropped = torch.tensor([1]), torch.tensor([0, 2])
        assert torch.equal(tensor.index_select(side, dropped), old.index_select(side, dropped))
        assert not torch.equal(tensor.index_select(side, kept), old.index_select(side, kept))
