"""S2FT's invariants (arXiv 2412.06289), beyond those of every adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_rows import shake
from torch import Tensor, nn

from turnout.peft import S2ftConfig, attach
from turnout.peft.co_permutation import permute_channels, permute_heads, selected_first
from turnout.wire import ConfigError

transformers = pytest.importorskip("transformers")

D, D_FF, LAYERS = 12, 32, 3
X = torch.randn(5, D, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A gated feed-forward block with biases, on a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, D_FF), nn.Linear(D, D_FF)
        self.down_proj = nn.Linear(D_FF, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(LAYERS)))


def trained(module: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(X) - 1).square().mean().backward()
        optimizer.step()


def llama(kv_heads: int, seed: int = 0) -> Any:
    """A transformer with grouped queries, from a configuration."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=16, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # Biases too: they start at 0.
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_permuting_channels_and_heads_together_changes_nothing(kv_heads: int) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    model = llama(kv_heads)
    with torch.no_grad():
        before = model(tokens).logits
        for layer in model.model.layers:
            mlp, attention = layer.mlp, layer.self_attn
            permute_channels([mlp.gate_proj, mlp.up_proj], mlp.down_proj, torch.randperm(24))
            permute_heads(
                attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                torch.arange(kv_heads).flip(0), kv_heads=kv_heads,
            )  # fmt: skip
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="kv_heads=3"):
        permute_heads(*(nn.Linear(16, 16) for _ in range(4)), torch.arange(3), kv_heads=3)


def test_the_index_form_is_the_permuted_form() -> None:
    config = S2ftConfig(d_ratio=0.2, target_modules=("down_proj",))
    by_index = attach(blocks(), config)
    permuted = blocks()
    ranges: dict[str, Tensor] = {}
    for name, layer in by_index.layers.items():
        block = permuted.get_submodule(name.rpartition(".")[0])
        order = selected_first(layer.s2_indices, D_FF)  # type: ignore[arg-type]
        permute_channels([block.gate_proj, block.up_proj], block.down_proj, order)  # type: ignore[list-item,arg-type]
        ranges[f"{name}.s2_indices"] = torch.arange(len(layer.s2_indices))  # type: ignore[arg-type]
    by_range = attach(permuted, config)
    by_range.load_shared_state(ranges)
    torch.testing.assert_close(by_range.module(X), by_index.module(X), atol=1e-5, rtol=1e-5)
    trained(by_index.module)
    trained(by_range.module)
    for name, tensor in by_index.trainable_state_dict().items():
        torch.testing.assert_close(by_range.trainable_state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_range.module(X), by_index.module(X), atol=1e-5, rtol=1e-5)


def test_all_ratio_1_is_full_fine_tuning_of_the_down_projections() -> None:
    adapted = attach(blocks(), S2ftConfig(d_ratio=1.0, target_modules=("down_proj",)))
    full = blocks().requires_grad_(False)
    for block in full:
        block.down_proj.weight.requires_grad_(True)  # type: ignore[union-attr]
    trained(adapted.module)
    trained(full)
    for name, layer in adapted.layers.items():
        weight = full.get_submodule(name).weight
        torch.testing.assert_close(layer.effective_weight(torch.float32), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.33, 1.0])
def test_the_pool_is_over_all_layers(ratio: float) -> None:
    adapted = attach(blocks(), S2ftConfig(d_ratio=ratio, target_modules=("down_proj",)))
    picked = [len(t) for t in adapted.shared_state().values()]
    assert sum(picked) == int(ratio * D_FF * LAYERS)
    assert sum(t.numel() for t in adapted.trainable_state_dict().values()) == sum(picked) * D


@pytest.mark.parametrize("ratios", [{"u_ratio": 0.2}, {"d_ratio": 0.1, "u_ratio": 0.2}])
def test_gradients_are_those_of_the_slices(ratios: dict[str, float]) -> None:
    adapted = attach(blocks(), S2ftConfig(**{"d_ratio": 0.0, **ratios}, target_modules=("down_proj",)))  # type: ignore[arg-type]
    dense = blocks()
    adapted.module(X).square().sum().backward()
    dense(X).square().sum().backward()
    assert {layer.dim for layer in adapted.layers.values()} == ({0, 1} if "d_ratio" in ratios else {0})
    for name, layer in adapted.layers.items():
        whole = dense.get_submodule(name).weight.grad
        expected = whole.index_select(layer.dim, layer.s2_indices)  # type: ignore[union-attr,arg-type]
        torch.testing.assert_close(layer.s2.grad, expected, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]


def test_heads_are_picked_whole() -> None:
    config = S2ftConfig(d_ratio=0.0, o_ratio=0.5, v_ratio=0.5, head_dim=4)
    adapted = attach(llama(4), config)
    for name, layer in adapted.layers.items():
        assert layer.dim == (1 if name.endswith("o_proj") else 0)
        heads = layer.s2_indices.reshape(-1, 4)  # type: ignore[operator]
        assert torch.equal(heads, heads[:, :1] + torch.arange(4))
        assert bool((heads[:, 0] % 4 == 0).all())
    assert sum(len(t) for t in adapted.shared_state().values()) == 4 * (int(0.5 * 8) + int(0.5 * 8))


def test_adapters_of_disjoint_channels_add_up_and_come_off_one_by_one() -> None:
    weight = torch.randn(D, D_FF)
    deltas = []
    for part in (torch.arange(0, 16), torch.arange(16, 32)):
        adapted = attach(nn.Sequential(nn.Linear(D_FF, D)), S2ftConfig(d_ratio=0.5))
        adapted.load_shared_state({"0.s2_indices": part})
        shake(adapted)
        deltas.append(adapted.delta_weights()["0"])
    both = weight + deltas[0] + deltas[1]
    assert torch.equal(both, weight + deltas[1] + deltas[0])
    torch.testing.assert_close(both - deltas[0], weight + deltas[1])
    assert torch.linalg.matrix_rank(deltas[0]) <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ratio": 0.0}, "nothing is trained"),
        ({"o_ratio": 0.5}, "head_dim is missing"),
        ({"d_ratio": 1.5}, "d_ratio=1.5"),
        ({"d_ratio": 0.001}, "pick no channel"),
        ({"d_ratio": 0.0, "v_ratio": 0.5, "v_modules": ("up_proj",), "head_dim": 5}, "head_dim=5"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(blocks(), S2ftConfig(target_modules=("down_proj",), **options))
