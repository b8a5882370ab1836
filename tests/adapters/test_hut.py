"""HUT's invariants: an element-wise product with a low-rank matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_rows import SIDES, shake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from turnout.peft import HutConfig, LoraConfig, attach
from turnout.peft.hut import Hut
from turnout.strategies.svd_factors import SvdFactors
from turnout.wire import ConfigError, ParameterLayout, as_array


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
    assert flops(LoraConfig(r=r), side, side // 2) == costs[0]  # n* of square layers, but for that product.
    assert [flops(LoraConfig(r=r), side, n) for n in (32, 256)] == [2 * n * r * 2 * side for n in (32, 256)]


def test_small_multipliers_of_a_16_bit_weight_are_not_rounded_to_one() -> None:
    layer = hut(W, r=2)
    layer.base_layer.to(torch.bfloat16)
    with torch.no_grad():
        layer.hut_B.mul_(1e-3)
    assert layer.multiplier().dtype == torch.float32
    assert (layer.multiplier() != 1).all()


@pytest.mark.parametrize("form", ["h1", "h2", "h3"])
def test_products_of_clients_are_averaged_exactly_by_the_server(form: str) -> None:
    """With ``exact-svd``: the mean of ``s B A``, at a rank that has room for it, is that of the updates."""
    options = {"r": 6, "alpha": 12, "hut_form": form, "aggregation": "exact-svd"}
    clients = []
    for seed in (1, 2, 3):
        adapted = attach(nn.Sequential(base_of(W)), HutConfig(**options))  # type: ignore[arg-type]
        first = adapted.trainable_state_dict()
        if form != "h2":  # Updates of rank 2 each, from a common A; of "h2" all are near its ones.
            for name, tensor in first.items():
                tensor[:, 2:] = 0 if name.rpartition(".")[2].startswith("hut_B") else tensor[:, 2:]
        moved = shake(adapted, seed=seed, scale=0.3 if form != "h2" else 1e-3)
        if form != "h2":
            for name in moved:
                if "hut_B" in name:
                    moved[name][:, 2:] = 0
            adapted.load_trainable_state_dict(moved)
        clients.append((moved, next(iter(adapted.delta_weights().values()))))
    config = HutConfig(**options)  # type: ignore[arg-type]
    assert config.dense_form is not None
    factors = SvdFactors(config.dense_form.groups, config.dense_form.scale)
    arrays = [{name: as_array(t.numpy()) for name, t in moved.items()} for moved, _ in clients]
    layout = ParameterLayout.from_arrays(arrays[0])
    factors.bind(layout, layout.flatten(arrays[0]))
    inside = [factors.inside(layout.flatten(a)).astype(np.float64) for a in arrays]
    found = layout.split(factors.outside(np.mean(inside, axis=0).astype(np.float32)))
    server = attach(nn.Sequential(base_of(W)), config)
    server.load_trainable_state_dict({name: torch.from_numpy(np.array(a)) for name, a in found.items()})
    exact = sum(delta for _, delta in clients) / 3
    (of_mean,) = server.delta_weights().values()
    torch.testing.assert_close(of_mean, exact, atol=1e-3 if form == "h2" else 2e-5, rtol=1e-4)


def base_of(weight: Tensor) -> nn.Linear:
    base = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        base.weight.copy_(weight)
    return base


def test_a_layer_of_zeros_would_stay_one() -> None:
    head = nn.Linear(4, 3)
    nn.init.zeros_(head.weight)
    with pytest.raises(ConfigError, match="layer '0' has only zeros"):
        attach(nn.Sequential(head), HutConfig(r=2))
    attach(nn.Sequential(head), HutConfig(r=2, hut_form="h3"))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="exact by itself"):
        HutConfig(freeze_a=True, aggregation="exact-svd")
    with pytest.raises(ConfigError, match="exact-svd"):
        HutConfig(aggregation="exact")
    assert HutConfig(freeze_a=True).aggregation == "exact"
    with pytest.raises(ConfigError, match="Did you mean 'h1'"):
        HutConfig(hut_form="h11")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alpha"):
        HutConfig(alpha=0)
