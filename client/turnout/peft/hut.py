"""HUT, Hadamard Updated Transformation (arXiv 2409.13501): the weight times a low-rank matrix, entry by
entry.

"Hadamard" is the element-wise product. The form H1, ``W * (1 + s B A)``, is a reconstruction from the
abstract; it is the published HiRA update. Two other readings of the abstract are kept behind ``hut_form``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from turnout.allocation import LowRankForm
from turnout.peft.config import AdapterConfig, check_averaging
from turnout.peft.layer import AdapterLayer, weight_of
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

Form = Literal["h1", "h2", "h3"]


@register(
    "hut", kind="adapter", paper="2409.13501", summary="Element-wise product with a low-rank matrix (HUT)"
)
@dataclass(frozen=True, kw_only=True)
class HutConfig(AdapterConfig):
    """HUT: ``W * (1 + s B A)`` element-wise, B (d_out, r), A (r, d_in), ``s = alpha / r``.

    What travels is r (d_in + d_out) numbers per layer, twice that for "h3". Zeros of W stay zeros. The
    factors multiply: the mean of the factors is not the mean of their products, unless A is frozen.

    Attributes
    ----------
    r
        Rank.
    alpha
        Numerator of the scale; by default r, so that s is 1.
    hut_form
        "h1" is the above, "h2" the plain product ``W * (B A)`` with ``B A`` all ones at first, "h3"
        ``W * (1 + s B A) + s B2 A2``.
    freeze_a
        Train B only; A, the same for all clients, does not travel.
    aggregation
        "exact" with ``freeze_a``, else "approximate", which averages the factors, or "exact-svd": the server
        averages the products ``s B A``, with whichever rule the strategy has, and sends factors of the
        result's best approximation of rank r. W, the same for all, multiplies what is left of the error.
    """

    aggregation: Literal["approximate", "exact", "exact-svd"] = "approximate"  # type: ignore[misc]

    r: int = 8
    alpha: float | None = None
    hut_form: Form = "h1"
    freeze_a: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank()
        if self.alpha is not None:
            check_number("alpha", self.alpha, low=0, open_low=True)
        if self.hut_form not in ("h1", "h2", "h3"):
            raise unknown_name("hut_form", str(self.hut_form), ("h1", "h2", "h3"))
        if self.freeze_a and self.aggregation != "exact-svd":
            object.__setattr__(self, "aggregation", "exact")
        elif self.freeze_a:
            raise ConfigError(
                "aggregation='exact-svd' has no use with freeze_a=true, which is exact by itself."
            )
        else:
            check_averaging(self.aggregation, "exact-svd")

    @property
    def dense_form(self) -> LowRankForm | None:  # type: ignore[override]
        """The factors' names and the scale, if the server averages their products."""
        groups = (("hut_A", "hut_B"), ("hut_A2", "hut_B2"))[: 2 if self.hut_form == "h3" else 1]
        return LowRankForm(groups, self.scale) if self.aggregation == "exact-svd" else None

    @property
    def scale(self) -> float:
        """The factor s; the plain product has none."""
        return 1.0 if self.alpha is None or self.hut_form == "h2" else self.alpha / self.r

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Hut:
        """Return the adapter of ``base_layer``.

        Raises `ConfigError` for a layer of zeros, such as a new head: no multiple of them is anything else.
        """
        if self.hut_form != "h3" and not weight_of(base_layer).any():
            raise ConfigError(
                f"layer {name!r} has only zeros, which a product leaves at zero; exclude it, or name it in "
                "modules_to_save to train it whole."
            )
        return Hut(base_layer, self, generator)


class Hut(AdapterLayer):
    """A linear layer with trained factors ``hut_A`` (r, d_in) and ``hut_B`` (d_out, r).

    The form "h3" adds ``hut_A2`` and ``hut_B2``. A frozen A is a buffer.
    """

    config: HutConfig

    def __init__(self, base_layer: nn.Module, config: HutConfig, generator: torch.Generator) -> None:
        super().__init__(base_layer, config)
        self.hut_A: Tensor
        self._add("hut_A", self._drawn(generator))
        b = torch.zeros(self.out_features, config.r)
        if config.hut_form == "h2":
            # One component is all ones; where A is noise, B is zero.
            with torch.no_grad():
                self.hut_A[0] = 1.0
            b[:, 0] = 1.0
        self.hut_B = nn.Parameter(b)
        if config.hut_form == "h3":
            self.hut_A2: Tensor
            self._add("hut_A2", self._drawn(generator))
            self.hut_B2 = nn.Parameter(torch.zeros(self.out_features, config.r))

    def multiplier(self) -> Tensor:
        """Return what W is multiplied with, shape (d_out, d_in), float32."""
        product = self.hut_B @ self.hut_A
        return product if self.config.hut_form == "h2" else 1.0 + self.config.scale * product

    def delta_weight(self) -> Tensor:
        """Return the change, which is ``W * s B A`` for "h1"."""
        w, product = self.base_weight.float(), self.hut_B @ self.hut_A
        if self.config.hut_form == "h2":
            return w * (product - 1.0)
        delta = w * (self.config.scale * product)
        if self.config.hut_form == "h3":
            delta = delta + self.config.scale * (self.hut_B2 @ self.hut_A2)
        return delta

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return W times the multiplier, which is built in float32."""
        weight = self.base_weight.float() * self.multiplier()
        if self.config.hut_form == "h3":
            weight = weight + self.config.scale * (self.hut_B2 @ self.hut_A2)
        return weight.to(dtype)

    def flipped_share(self) -> float:
        """Return the share of entries whose multiplier is negative: weights that changed their sign."""
        with torch.no_grad():
            return float((self.multiplier() < 0).float().mean())

    def _drawn(self, generator: torch.Generator) -> Tensor:
        a = torch.empty(self.config.r, self.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return a

    def _add(self, name: str, value: Tensor) -> None:
        if self.config.freeze_a:
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, nn.Parameter(value))
