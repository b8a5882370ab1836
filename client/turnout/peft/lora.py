"""LoRA: a low-rank change of the weight (Hu et al., arXiv 2106.09685); rank-stabilised scaling 2312.03732."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.allocation import LowRankForm
from turnout.peft.config import AdapterConfig, check_averaging
from turnout.peft.layer import AdapterLayer
from turnout.peft.seeded_dropout import dropping
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register("lora", kind="adapter", paper="2106.09685", summary="Low-rank change of the weights (LoRA)")
@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA with ``delta = s B A``, A (r, d_in), B (d_out, r), ``s = lora_alpha / r``.

    What travels is r (d_in + d_out) numbers per layer. The mean of the factors is not the mean of their
    products: aggregation is approximate.

    Attributes
    ----------
    r
        Rank.
    lora_alpha
        Numerator of the scale.
    lora_dropout
        Probability with which an input of the factors is dropped in a training step; the frozen layer has all
        of them. Equal seeds give equal draws on every engine and executor of one kind of device.
    use_rslora
        Scale by ``lora_alpha / sqrt(r)`` instead.
    aggregation
        "approximate" averages the factors. "exact-svd" averages the dense updates ``s B A``, with
        whichever rule the strategy has, and sends factors of the result's best approximation of rank r; costs
        the server memory for dense layers and an SVD of each in every round.
    init_lora_weights
        True draws A as ``nn.Linear`` does; "gaussian" from N(0, 1/r^2). B starts at 0.
    """

    aggregation: Literal["approximate", "exact-svd"] = "approximate"  # type: ignore[misc]

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: Literal[True, "gaussian"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank()
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is not possible; use true or 'gaussian'."
            )
        check_averaging(self.aggregation, "exact-svd")
        check_number("lora_alpha", self.lora_alpha, low=0, open_low=True)
        check_number("lora_dropout", self.lora_dropout, low=0, high=1, open_high=True)

    @property
    def dense_form(self) -> LowRankForm | None:  # type: ignore[override]
        """The factors' names and the scale, if the server averages dense updates."""
        return LowRankForm((("lora_A", "lora_B"),), self.scale) if self.aggregation == "exact-svd" else None

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Lora:
        """Return the adapter of ``base_layer``."""
        return Lora(base_layer, self, generator, name)


class Lora(AdapterLayer):
    """A linear layer with trained factors ``lora_A`` (r, d_in) and ``lora_B`` (d_out, r)."""

    config: LoraConfig

    def __init__(
        self, base_layer: nn.Module, config: LoraConfig, generator: torch.Generator, name: str = ""
    ) -> None:
        super().__init__(base_layer, config)
        self.lora_dropout = dropping(config.lora_dropout, name)
        a = torch.empty(config.r, self.in_features)
        if config.init_lora_weights == "gaussian":
            a.normal_(std=1 / config.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r))

    def delta_weight(self) -> Tensor:
        """Return ``s B A``."""
        return self.config.scale * (self.lora_B @ self.lora_A)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus ``s B (A x)``, without the dense weight."""
        base: Tensor = self.base_layer(x)
        branch = linear(linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A), self.lora_B)
        return base + (self.config.scale * branch).to(base.dtype)
