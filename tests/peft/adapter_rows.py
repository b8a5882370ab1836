"""Every adapter, with what its tests need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turnout.peft import Adapted, AdapterConfig, attach
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
