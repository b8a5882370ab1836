"""Every adapter, with what its tests need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turnout.peft import Adapted, AdapterConfig, attach
from turnout.peft.tera import default_modes
from turnout.wire.registry import find

SIDES = (16, 24)  # d_out, d_in of the layer that the tests look at most.


@dataclass(frozen=True)
class Row:
    """One adapter in one setting.

    ``count`` is the card's formula: the numbers that travel for a layer (d_out, d_in). ``dead`` names the
    tensors whose first gradient is zero, by the method's design. ``exact`` says whether the mean of what
    travels is the mean of the dense updates.
    """

    slug: str
    options: Mapping[str, Any]
    count: Callable[[int, int], int]
    exact: bool
    dead: frozenset[str] = field(default_factory=frozenset)
    starts_at_base: bool = True
    near: float = 1e-6  # How near to the base one starts that does not start at it.

    @property
    def config(self) -> AdapterConfig:
        config: AdapterConfig = find("adapter", self.slug).target(**self.options)
        return config

    def __str__(self) -> str:
        return "-".join([self.slug, *(f"{key}={value}" for key, value in self.options.items())])


ROWS = [
    Row("lora", {"r": 4}, lambda o, i: 4 * (o + i), exact=False, dead=frozenset({"lora_A"})),
    Row("bone", {"r": 8}, lambda o, i: o * 8, exact=True),
    Row("miss", {"r": 8}, lambda o, i: o * 8, exact=True),
    Row("miss", {"r": 7}, lambda o, i: o * 7, exact=True),
    Row("miss", {"r": 6, "init_weights": "mini", "mini_r": 4}, lambda o, i: 24, exact=True),
    Row("paca", {"r": 5, "paca_alpha": 5}, lambda o, i: o * 5, exact=True),
    Row("paca", {"r": 4, "paca_alpha": 8}, lambda o, i: o * 4, exact=True),
    Row("s2ft", {"d_ratio": 0.25}, lambda o, i: o * (i // 4), exact=True),
    Row("lift", {"r": 2, "filter_rank": 3}, lambda o, i: min(2 * (o + i), o * i), exact=True),
]

ROWS += [
    Row(
        "adalora",
        {"init_r": 4, "target_r": 2, "total_step": 10},
        lambda o, i: 4 * (o + i + 1),
        exact=False,
        dead=frozenset({"lora_A", "lora_B"}),
    ),
    Row("hut", {"r": 4}, lambda o, i: 4 * (o + i), exact=False, dead=frozenset({"hut_A"})),
    Row("hut", {"r": 4, "freeze_a": True}, lambda o, i: 4 * o, exact=True),
    Row("hut", {"r": 4, "hut_form": "h2"}, lambda o, i: 4 * (o + i), exact=False),
    Row(
        "hut",
        {"r": 3, "hut_form": "h3", "alpha": 6},
        lambda o, i: 6 * (o + i),
        exact=False,
        dead=frozenset({"hut_A", "hut_A2"}),
    ),
    Row(
        "ist",
        {"base": {"name": "lora", "r": 4}},
        lambda o, i: 4 * (o + i),
        exact=False,
        dead=frozenset({"lora_A"}),
    ),
    Row("ist", {"base": {"name": "miss", "r": 8}, "mode": "local"}, lambda o, i: o * 8, exact=True),
    Row(
        "snella",
        {"r": 4, "total_step": 10, "init_sparsity": 0.2},
        lambda o, i: 4 * (o + i) + 3,
        exact=False,
        starts_at_base=False,
        near=0.3,
    ),
    Row(
        "snella",
        {"r": 4, "total_step": 10, "init_sparsity": 0.2, "aggregation": "exact-fold"},
        lambda o, i: 4 * (o + i) + 3,
        exact=False,
    ),
    Row(
        "snella",
        {"r": 4, "total_step": 10, "competition": False, "checkpointing": False},
        lambda o, i: 4 * (o + i),
        exact=False,
        starts_at_base=False,
        near=0.01,
    ),
    Row(
        "tera",
        {"train_modes": "all", "projection_prng_key": 5},
        lambda o, i: sum(default_modes(o)) + sum(default_modes(i)),
        exact=False,
        dead=frozenset({"1", "2", "3"}),
    ),
    Row(
        "tera",
        {"ranks": 6, "train_modes": "all", "save_projection": True},
        lambda o, i: 6 * len(default_modes(o) + default_modes(i)),
        exact=False,
        dead=frozenset({"1", "2", "3"}),
    ),
    Row("weight-compander", {}, lambda o, i: o * i + o, exact=True),
    Row(
        "weight-compander",
        {"transfer": "latent", "learnable": True},
        lambda o, i: o * i + o + 2,
        exact=False,
        starts_at_base=False,
    ),
]


def ids(row: Row) -> str:
    return str(row)


def one_layer(row: Row, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Adapted, nn.Linear]:
    """Return ``row``'s adapter on a single linear layer, and that layer as it was before."""
    torch.manual_seed(seed)
    linear = nn.Linear(SIDES[1], SIDES[0])
    before = nn.Linear(SIDES[1], SIDES[0])
    before.load_state_dict(linear.state_dict())
    return attach(nn.Sequential(linear.to(dtype)), row.config), before.to(dtype)


def shake(adapted: Adapted, seed: int = 1, scale: float = 0.1) -> dict[str, Tensor]:
    """Move all that is trained by random amounts, as training would; return it."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapted.trainable_state_dict().items()
    }
    adapted.load_trainable_state_dict(state)
    return state
