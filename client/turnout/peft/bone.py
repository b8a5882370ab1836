"""Bone, Block Affine adaptation (arXiv 2409.15371): Bat, of its first versions, and MiSS, of later ones.

The paper was renamed on its way: up to version 3 "Bone" is what is called Bat since; from version 4 on it is
shard sharing, MiSS. Both are linear in the trained block, so that its mean is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer, weight_of
from turnout.peft.seeded_dropout import dropping
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

Variant = Literal[True, "bat", "mini"]


@register(
    "miss", kind="adapter", paper="2409.15371", summary="One block shared by all shards of the inputs (MiSS)"
)
@dataclass(frozen=True, kw_only=True)
class MissConfig(AdapterConfig):
    """MiSS: ``delta[o, c] = D[c mod r, o]`` with one trained block D (r, d_out), zero at first.

    What travels is r d_out numbers per layer; "mini" r mini_r.

    Attributes
    ----------
    r
        Rows of the block, the length of a shard of the inputs; for "bat" the side of a square block, which
        must divide d_in and d_out.
    mini_r
        Columns of the block of "mini", which is repeated along the outputs; must divide d_out.
    init_weights
        True is MiSS, "mini" its smaller form, "bat" Bat.
    miss_dropout
        Probability with which an input of the block is dropped in a training step, as ``lora_dropout`` of
        LoRA; Bat ignores it, as in ``peft``.
    """

    aggregation: ClassVar[Aggregation] = "exact"

    r: int = 64
    mini_r: int = 1
    init_weights: Variant = True
    miss_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank()
        self.check_rank("mini_r")
        check_number("miss_dropout", self.miss_dropout, low=0, high=1, open_high=True)
        if self.init_weights not in (True, "bat", "mini"):
            raise ConfigError(
                f"init_weights={self.init_weights!r} is not possible; use true, 'bat' or 'mini'."
            )

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """Return the adapter of ``base_layer``. Raises `ConfigError` where the block does not fit."""
        d_out, d_in = weight_of(base_layer).shape
        if self.r > d_in:
            raise ConfigError(f"r={self.r} is more than the {d_in} inputs of {name!r}; use at most {d_in}.")
        if self.init_weights == "bat":
            if d_in % self.r or d_out % self.r:
                raise ConfigError(
                    f"r={self.r} does not divide the sides ({d_out}, {d_in}) of {name!r}, as 'bat' needs it; "
                    "choose a common divisor, or exclude the layer."
                )
            return Bat(base_layer, self)
        if self.init_weights == "mini" and d_out % self.mini_r:
            raise ConfigError(
                f"mini_r={self.mini_r} does not divide the {d_out} outputs of {name!r}; choose a divisor."
            )
        return Miss(base_layer, self, name)


@register(
    "bone", kind="adapter", paper="2409.15371", summary="Blocks of the weight guide their update (Bone, Bat)"
)
@dataclass(frozen=True, kw_only=True)
class BoneConfig(MissConfig):
    """Bat: each r x r block of the weight changes by ``(W_ij + I) B_i``, B (d_out / r, r, r) zero at first.

    What travels is r d_out numbers per layer. `MissConfig` with another default of ``init_weights``.
    """

    init_weights: Variant = "bat"


class Bat(AdapterLayer):
    """A linear layer with trained blocks ``miss_block`` (d_out / r, r, r)."""

    config: MissConfig

    def __init__(self, base_layer: nn.Module, config: MissConfig) -> None:
        super().__init__(base_layer, config)
        r = config.r
        self.miss_block = nn.Parameter(torch.zeros(self.out_features // r, r, r))

    def delta_weight(self) -> Tensor:
        """Return the blocks ``(W_ij + I) B_i``, put together."""
        r, (d_out, d_in) = self.config.r, self.weight.shape
        blocks = self.base_weight.float().reshape(d_out // r, r, d_in // r, r).permute(0, 2, 1, 3)
        delta = (blocks + torch.eye(r, device=blocks.device)) @ self.miss_block[:, None]
        return delta.permute(0, 2, 1, 3).reshape(d_out, d_in)


class Miss(AdapterLayer):
    """A linear layer with the trained block ``miss_block`` (r, d_out), or (r, mini_r)."""

    config: MissConfig

    def __init__(self, base_layer: nn.Module, config: MissConfig, name: str = "") -> None:
        super().__init__(base_layer, config)
        self.miss_dropout = dropping(config.miss_dropout, name)
        columns = config.mini_r if config.init_weights == "mini" else self.out_features
        self.miss_block = nn.Parameter(torch.zeros(config.r, columns))

    def block(self) -> Tensor:
        """Return D, shape (r, d_out)."""
        return self.miss_block.repeat(1, self.out_features // self.miss_block.shape[1])

    def delta_weight(self) -> Tensor:
        """Return ``D^T [I I ... I]``, cut to d_in columns."""
        repeats = -(-self.in_features // self.config.r)
        return self.block().T.repeat(1, repeats)[:, : self.in_features]

    def adapted(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus ``S D``, S the sum over the inputs' shards of length r."""
        base: Tensor = self.base_layer(x)
        padded = pad(self.miss_dropout(x), (0, -x.shape[-1] % self.config.r))
        shards = padded.reshape(*padded.shape[:-1], -1, self.config.r).sum(-2)
        return base + linear(shards.to(self.miss_block.dtype), self.block().T).to(base.dtype)
