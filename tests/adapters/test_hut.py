"""HUT's invariants: an element-wise product with a low-rank matrix."""

from __future__ import annotations

import pytest
import torch
from adapter_rows import SIDES, shake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from turnout.peft import HutConfig, LoraConfig, attach
from turnout.peft.hut import Hut
from turnout.wire import ConfigError


def hut(weight: Tensor, **options: object) -> Hut:
    base = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        base.weight.copy_(weight)
    adapted = attach(nn.Sequential(base), HutConfig(**options))  # type: ignore[arg-type]
    shake(adapted, scale=0.5)
    (layer,) = adapted.layers.values()
    assert isinstance(layer, Hut)
    return layer


W = torch.randn(SIDES, generator=torch.Generator().manual_seed(3))


def test_the_two_branches_are_one_product() -> None:
    layer = hut(W, r=3, alpha=6)
    x = torch.randn(7, SIDES[1])
    branch = nn.functional.linear(x, W * (2.0 * layer.hut_B @ layer.hut_A))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + branch, atol=1e-5, rtol=1e-5)


def test_on_ones_it_is_lora() -> None:
    layer = hut(torch.ones(SIDES), r=3)
    torch.testing.assert_close(layer.delta_weight(), layer.hut_B @ layer.hut_A)


@pytest.mark.parametrize("form", ["h1", "h2"])
def test_zeros_stay_zeros(form: str) -> None:
    pruned = W * (torch.rand(SIDES, generator=torch.Generator().manual_seed(1)) < 0.3)
    layer = hut(pruned, r=4, hut_form=form)
    layer.merge()
    assert torch.equal(layer.weight == 0, pruned == 0)


def test_rank_is_not_bounded_by_r() -> None:
    layer = hut(W, r=2)
    rank = int(torch.linalg.matrix_rank(layer.delta_weight()))
    assert 2 < rank <= min(SIDES)
    thin = torch.randn(SIDES[0], 3) @ torch.randn(3, SIDES[1])
    assert int(torch.linalg.matrix_rank(hut(thin, r=2).delta_weight())) == 3 * 2


def test_rank_one_scales_rows_and_columns() -> None:
    layer = hut(W, r=1)
    expected = torch.diag(layer.hut_B[:, 0]) @ W @ torch.diag(layer.hut_A[0])
    torch.testing.assert_close(layer.delta_weight(), expected, atol=1e-5, rtol=1e-5)
    thin = torch.randn(SIDES[0], 3) @ torch.randn(3, SIDES[1])
    assert int(torch.linalg.matrix_rank(hut(thin, r=1).delta_weight())) == 3


def test_the_change_scales_with_the_weight() -> None:
    once, thrice = hut(W, r=3), hut(3 * W, r=3)
    torch.testing.assert_close(thrice.delta_weight(), 3 * once.delta_weight())


def test_the_product_form_starts_at_all_ones() -> None:
    base = nn.Linear(SIDES[1], SIDES[0])
    (layer,) = attach(nn.Sequential(base), HutConfig(r=3, hut_form="h2")).layers.values()
    assert isinstance(layer, Hut)
    assert torch.equal(layer.multiplier(), torch.ones(SIDES))
    assert layer.flipped_share() == 0
    with torch.no_grad():
        layer.hut_B.neg_()
    assert layer.flipped_share() == 1


def flops(config: HutConfig | LoraConfig, side: int, tokens: int) -> int:
    """Count multiplications of the adapter in a forward pass, beside those of the frozen layer."""
    (layer,) = attach(nn.Sequential(nn.Linear(side, side, bias=False)), config).layers.values()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(tokens, side))
    return int(counter.get_total_flops()) - 2 * tokens * side * side


def test_its_cost_does_not_grow_with_the_tokens() -> None:
    side, r = 64, 8
    costs = [flops(HutConfig(r=r), side, n) for n in (32, 256)]
    assert costs == [2 * r * side * side] * 2  # The element-wise product is no multiplication of matrices.
    assert [flops(LoraConfig(r=r), side, n) for n in (32, 256)] == [2 * n * r * 2 * side for n in (32, 256)]


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'h1'"):
        HutConfig(hut_form="h11")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alpha"):
        HutConfig(alpha=0)
