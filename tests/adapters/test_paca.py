"""PaCA's invariants (arXiv 2503.01905), beyond those of every adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_rows import SIDES, shake
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.peft import LoraConfig, PacaConfig, S2ftConfig, attach
from turnout.wire import ConfigError

D_OUT, D_IN = SIDES
X = torch.randn(4, 7, D_IN, generator=torch.Generator().manual_seed(1))


def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT)


def trained(module: nn.Module, optimizer: str, steps: int = 5) -> nn.Module:
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    stepper = made([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        stepper.zero_grad()
        (module(X) - 1).square().mean().backward()
        stepper.step()
    return module


def paca(r: int, alpha: float | None = None) -> Any:
    return attach(nn.Sequential(base()), PacaConfig(r=r, paca_alpha=alpha or r))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_with_all_columns_it_is_full_fine_tuning(optimizer: str) -> None:
    adapted = paca(D_IN)
    trained(adapted.module, optimizer)
    full = base()
    full.bias.requires_grad_(False)
    trained(full, optimizer)
    (layer,) = adapted.layers.values()
    torch.testing.assert_close(layer.effective_weight(torch.float32), full.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_lora_with_a_frozen_selection(optimizer: str) -> None:
    adapted = paca(4)
    (layer,) = adapted.layers.values()
    lora = attach(nn.Sequential(base()), LoraConfig(r=4, lora_alpha=4))
    (other,) = lora.layers.values()
    with torch.no_grad():
        other.lora_A.zero_()
        other.lora_A[torch.arange(4), layer.paca_indices] = 1.0
    other.lora_A.requires_grad_(False)
    trained(adapted.module, optimizer)
    trained(lora.module, optimizer)
    torch.testing.assert_close(layer.delta_weight(), other.delta_weight(), atol=1e-6, rtol=1e-5)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_is_s2ft_with_the_same_columns(optimizer: str) -> None:
    adapted = paca(4)
    s2ft = attach(nn.Sequential(base()), S2ftConfig(d_ratio=4 / D_IN + 1e-9))
    s2ft.load_shared_state({"0.s2_indices": adapted.shared_state()["0.paca_indices"]})
    trained(adapted.module, optimizer)
    trained(s2ft.module, optimizer)
    ours, theirs = (a.delta_weights()["0"] for a in (adapted, s2ft))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("alpha", [4.0, 12.0])
def test_the_gradient_is_that_of_the_selected_columns(alpha: float) -> None:
    adapted = paca(4, alpha)
    (layer,) = adapted.layers.values()
    adapted.module(X).square().sum().backward()
    weight = base().weight.detach().requires_grad_()
    linear(X, weight, base().bias).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(
        layer.paca_w.grad, alpha / 4 * weight.grad[:, layer.paca_indices], atol=1e-3, rtol=1e-5
    )


def test_other_columns_are_never_touched_and_merging_overwrites() -> None:
    adapted = paca(4)
    (layer,) = adapted.layers.values()
    trained(adapted.module, "adam")
    adapted.merge()
    once = layer.weight.clone()
    others = [c for c in range(D_IN) if c not in layer.paca_indices.tolist()]
    assert torch.equal(once[:, others], base().weight[:, others])
    assert torch.equal(once[:, layer.paca_indices], layer.paca_w)
    adapted.unmerge()
    adapted.merge()
    assert torch.equal(layer.weight, once)


def test_backward_keeps_the_selected_inputs_only() -> None:
    adapted = paca(4)
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted.module(X.clone().requires_grad_()).sum()
    assert (4, 7, 4) in {tuple(s) for s in shapes} | {
        (4, 7, s[-1]) for s in shapes if s.numel() == 4 * 7 * s[-1]
    }
    assert not [s for s in shapes if s.numel() == X.numel()]


def test_there_is_no_stale_weight_between_step_and_evaluation() -> None:
    adapted = paca(4)
    before = adapted.module(X)
    shake(adapted)
    assert not torch.equal(adapted.module(X), before)


def test_more_columns_than_there_are() -> None:
    with pytest.raises(ConfigError, match="at most 24"):
        paca(25)
