"""SNELLA's invariants: the kernel, the sparsifier, the scores (the shares: tests/allocation)."""

from __future__ import annotations

import pytest
import torch
from adapter_rows import SIDES
from torch import Tensor, nn

from turnout.peft import SnellaConfig, attach
from turnout.peft.allocating import update_and_allocate
from turnout.peft.snella import Snella, sparse_square
from turnout.strategies import folded_kernels
from turnout.wire import ConfigError


def snella(**options: object) -> Snella:
    config = SnellaConfig(**{"r": 4, "total_step": 10, **options})  # type: ignore[arg-type]
    (layer,) = attach(nn.Sequential(nn.Linear(SIDES[1], SIDES[0])), config).layers.values()
    assert isinstance(layer, Snella)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for q in (layer.In_Qs, layer.Out_Qs):
            q.copy_(torch.randn(q.shape, generator=generator))
    return layer


def distances(layer: Snella) -> Tensor:
    inner, outer = layer.In_Qs[:, :, None], layer.Out_Qs[:, None]
    return (inner - outer).square().sum(-1).sqrt()


def test_the_kernel_is_a_difference_of_distances_and_a_competition() -> None:
    layer = snella()
    d = distances(layer)
    k = 0.1 * (d[0] - d[1])
    torch.testing.assert_close(snella(competition=False).kernel(), k, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.alpha.fill_(0.5)
        layer.gamma.fill_(2.0)
        layer.beta.fill_(0.3)
    expected = k + 0.5 * torch.softmax(k / 2.0, dim=-1) + 0.3
    torch.testing.assert_close(layer.kernel(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layer.alpha.zero_()
        layer.beta.zero_()
    torch.testing.assert_close(layer.kernel(), k, atol=1e-5, rtol=1e-5)


def test_kept_entries_are_signed_squares_and_the_rest_is_zero() -> None:
    layer = snella(competition=False)
    layer.num_kept.fill_(100)
    delta, k = layer.delta_weight().T, layer.kernel()
    assert int((delta != 0).sum()) == 100
    limit = k.abs().flatten().sort(descending=True).values[99]
    torch.testing.assert_close(delta, torch.where(k.abs() >= limit, k * k.abs(), 0.0))
    layer.num_kept.fill_(SIDES[0] * SIDES[1])
    torch.testing.assert_close(layer.delta_weight().T, k * k.abs())
    layer.num_kept.fill_(0)
    assert not layer.delta_weight().any()


def test_of_entries_that_tie_at_the_limit_none_is_kept() -> None:
    k = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
    assert sparse_square(k, 2).tolist() == [[4.0, 0.0, 0.0, 0.0]]
    assert not sparse_square(torch.ones(2, 2), 3).any()
    assert folded_kernels.sparse_square(k.numpy(), 2).tolist() == [[4.0, 0.0, 0.0, 0.0]]


def test_the_gradient_is_the_size_of_what_is_kept() -> None:
    k = torch.tensor([[1.0, -2.0], [0.5, -3.0]], requires_grad=True)
    sparse_square(k, 2).sum().backward()
    assert k.grad is not None
    assert k.grad.tolist() == [[0.0, 2.0], [0.0, 3.0]]


def test_distances_do_not_see_where_the_origin_is() -> None:
    layer = snella(competition=False)
    before = layer.delta_weight()
    with torch.no_grad():
        rotation = torch.linalg.qr(torch.randn(2, 2)).Q
        for q in (layer.In_Qs, layer.Out_Qs):
            q.copy_((q + 0.7) @ rotation)
    torch.testing.assert_close(layer.delta_weight(), before, atol=1e-4, rtol=1e-3)
    with torch.no_grad():  # The kernels' signs alternate.
        for q in (layer.In_Qs, layer.Out_Qs):
            q.copy_(q.flip(0))
    torch.testing.assert_close(layer.delta_weight(), -before, atol=1e-4, rtol=1e-3)


def test_rank_is_above_that_of_the_thin_matrices() -> None:
    assert int(torch.linalg.matrix_rank(snella().delta_weight())) > 4


def test_coinciding_points_have_a_finite_gradient() -> None:
    layer = snella()
    with torch.no_grad():
        layer.Out_Qs[:, 0] = layer.In_Qs[:, 0]
        layer.gamma.zero_()
    layer(torch.randn(3, SIDES[1])).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (layer.In_Qs, layer.Out_Qs))  # type: ignore[arg-type]


def test_the_first_change_is_tiny_at_the_size_of_a_transformer() -> None:
    config = SnellaConfig(total_step=10)
    (layer,) = attach(nn.Sequential(nn.Linear(768, 768, bias=False)), config).layers.values()
    with torch.no_grad():
        assert 0 < float(layer.delta_weight().abs().max()) < 1e-4


def test_checkpointing_changes_nothing_but_memory() -> None:
    x = torch.randn(3, SIDES[1])
    gradients = []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        layer = snella(checkpointing=checkpointing)
        layer(x).square().sum().backward()
        gradients.append(layer.In_Qs.grad)
    torch.testing.assert_close(*gradients)


def test_the_layer_that_must_change_gets_the_most() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())))
    teacher = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())))
    teacher.load_state_dict(module.state_dict())
    with torch.no_grad():
        teacher[4].weight += 0.8 * torch.randn(8, 8)  # type: ignore[operator]
    config = SnellaConfig(
        r=4, kernel_scale=1.0, target_sparsity=0.8, tinit=20, tfinal=20, deltaT=5, total_step=120
    )
    adapted = attach(module, config)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.03)
    x = torch.randn(256, 8)
    for step in range(1, 121):
        optimizer.zero_grad()
        (module(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        update_and_allocate(adapted, step)
    kept = {name: int(layer.num_kept) for name, layer in adapted.layers.items()}  # type: ignore[call-overload]
    assert sum(kept.values()) == round(0.2 * 4 * 64)
    assert max(kept, key=kept.__getitem__) == "4", kept


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="num_kernels=2"):
        SnellaConfig(r=5, total_step=9)
    with pytest.raises(ConfigError, match="target_sparsity"):
        SnellaConfig(target_sparsity=1.0, total_step=9)
