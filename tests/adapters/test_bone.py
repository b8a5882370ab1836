"""Bone's invariants (arXiv 2409.15371), beyond those of every adapter."""

from __future__ import annotations

import pytest
import torch
from adapter_rows import SIDES, Row, one_layer, shake
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.peft import AdapterConfig, BoneConfig, MissConfig, attach
from turnout.wire import ConfigError

R = 8


def shaken(config: AdapterConfig, weight: Tensor, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return the trained block and the delta on a layer of ``weight``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    adapted = attach(nn.Sequential(layer), config)
    shake(adapted, scale=scale)
    ((name, delta),) = adapted.delta_weights().items()
    return adapted.trainable_state_dict()[f"{name}.miss_block"], delta


def random_weight() -> Tensor:
    return torch.randn(SIDES, generator=torch.Generator().manual_seed(3))


def test_bat_block_by_block() -> None:
    weight = random_weight()
    block, delta = shaken(BoneConfig(r=R), weight)
    for i in range(SIDES[0] // R):
        for j in range(SIDES[1] // R):
            piece = (slice(i * R, (i + 1) * R), slice(j * R, (j + 1) * R))
            torch.testing.assert_close(delta[piece], (weight[piece] + torch.eye(R)) @ block[i])


def test_bat_is_undone_by_the_inverse() -> None:
    weight = random_weight()
    block, delta = shaken(BoneConfig(r=R), weight, scale=0.05)
    merged = weight + delta
    for i in range(SIDES[0] // R):
        rows = slice(i * R, (i + 1) * R)
        for j in range(SIDES[1] // R):
            columns = slice(j * R, (j + 1) * R)
            back = (merged[rows, columns] - block[i]) @ torch.linalg.inv(torch.eye(R) + block[i])
            torch.testing.assert_close(back, weight[rows, columns], atol=1e-5, rtol=1e-5)


def test_bat_of_a_zero_weight_repeats_its_block_and_with_r_1_scales_rows() -> None:
    block, delta = shaken(BoneConfig(r=R), torch.zeros(SIDES))
    assert torch.equal(delta, block.reshape(SIDES[0], R).repeat(1, SIDES[1] // R))
    weight = random_weight()
    block, delta = shaken(BoneConfig(r=1), weight)
    torch.testing.assert_close(delta, block.reshape(-1, 1) * (weight + 1))


def test_ranks() -> None:
    weight = random_weight()
    assert torch.linalg.matrix_rank(shaken(BoneConfig(r=R), weight)[1]) == SIDES[0]
    assert torch.linalg.matrix_rank(shaken(MissConfig(r=R), weight)[1]) <= R


@pytest.mark.parametrize("r", [8, 7])
def test_miss_is_lora_with_a_frozen_row_of_identities(r: int) -> None:
    block, delta = shaken(MissConfig(r=r), random_weight())
    a = torch.eye(r).repeat(1, -(-SIDES[1] // r))[:, : SIDES[1]]
    torch.testing.assert_close(delta, block.T @ a)
    for o in range(SIDES[0]):
        for c in range(SIDES[1]):
            assert delta[o, c] == block[c % r, o]


def test_miss_adds_up_shards_of_the_inputs() -> None:
    adapted, base = one_layer(Row("miss", {"r": 7}, lambda o, i: 0, exact=True))
    shake(adapted)
    x = torch.randn(3, SIDES[1])
    padded = torch.cat([x, torch.zeros(3, 4)], dim=1)
    sums = sum(padded[:, start : start + 7] for start in range(0, 28, 7))
    block = adapted.trainable_state_dict()["0.miss_block"]
    torch.testing.assert_close(adapted.module(x), linear(x, base.weight, base.bias) + sums @ block)  # type: ignore[operator]


def test_bats_gradient_is_the_sum_over_its_blocks() -> None:
    adapted, _ = one_layer(Row("bone", {"r": R}, lambda o, i: 0, exact=True))
    (layer,) = adapted.layers.values()
    x = torch.randn(5, SIDES[1])
    adapted.module(x).square().sum().backward()
    weight = layer.base_weight.detach().clone().requires_grad_()
    linear(x, weight, layer.bias).square().sum().backward()
    gradient = weight.grad
    assert gradient is not None
    for i in range(SIDES[0] // R):
        expected = torch.zeros(R, R)
        for j in range(SIDES[1] // R):
            piece = (slice(i * R, (i + 1) * R), slice(j * R, (j + 1) * R))
            expected += (weight.detach()[piece] + torch.eye(R)).T @ gradient[piece]
        torch.testing.assert_close(layer.miss_block.grad[i], expected, atol=1e-4, rtol=1e-4)  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BoneConfig(r=7), "does not divide"),
        (MissConfig(r=25), "at most 24"),
        (MissConfig(r=4, mini_r=5, init_weights="mini"), "mini_r=5"),
    ],
)
def test_blocks_that_do_not_fit(config: AdapterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(nn.Sequential(nn.Linear(SIDES[1], SIDES[0])), config)
    with pytest.raises(ConfigError, match="init_weights"):
        MissConfig(init_weights="bats")  # type: ignore[arg-type]
