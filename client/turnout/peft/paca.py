"""PaCA, Partial Connection Adaptation: some input columns are trained in place (arXiv 2503.01905)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer, weight_of
from turnout.peft.selected import add_inputs, dense
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register(
    "paca", kind="adapter", paper="2503.01905", summary="Random input columns of the weights in place (PaCA)"
)
@dataclass(frozen=True, kw_only=True)
class PacaConfig(AdapterConfig):
    """PaCA: ``W[:, idx] = s P``, P (d_out, r), ``s = paca_alpha / r``, for r random columns idx.

    What travels is r d_out numbers per layer. The columns follow from ``seed`` and the layer's name.

    Attributes
    ----------
    r
        Number of columns, at most d_in.
    paca_alpha
        Numerator of the scale s, which only scales the learning rate: steps move the columns by s^2 with SGD,
        by s with Adam.
    """

    aggregation: ClassVar[Aggregation] = "exact"
    shares: ClassVar[bool] = True

    r: int = 8
    paca_alpha: float = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank()
        check_number("paca_alpha", self.paca_alpha, low=0, open_low=True)

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.paca_alpha / self.r

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Paca:
        """Return the adapter of ``base_layer``. Raises `ConfigError` for more columns than it has."""
        columns = weight_of(base_layer).shape[1]
        if self.r > columns:
            raise ConfigError(
                f"r={self.r} is more than the {columns} inputs of {name!r}; use at most {columns}."
            )
        return Paca(base_layer, self, torch.randperm(columns, generator=generator)[: self.r])


class Paca(AdapterLayer):
    """A linear layer with trained columns ``paca_w`` (d_out, r) at ``paca_indices`` (r,)."""

    config: PacaConfig
    shared_names = ("paca_indices",)

    def __init__(self, base_layer: nn.Module, config: PacaConfig, indices: Tensor) -> None:
        super().__init__(base_layer, config)
        self.paca_indices: Tensor
        self.register_buffer("paca_indices", indices)
        self.paca_w = nn.Parameter(self._columns() / config.scale)

    def delta_weight(self) -> Tensor:
        """Return the change of the columns, zeros elsewhere."""
        return dense(self.weight.shape, 1, self.paca_indices, self._delta())

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return W with the trained columns in their places; the others are W's, bit for bit."""
        columns = (self.config.scale * self.paca_w).to(dtype)
        return self.base_weight.to(dtype).index_copy(1, self.paca_indices, columns)

    def adapted(self, x: Tensor) -> Tensor:
        """Return ``x W^T + x[..., idx] (s P - W[:, idx])^T``; of the inputs, backward needs the selected."""
        return add_inputs(self.base_layer(x), x, self.paca_indices, self._delta())

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Take over the columns, which start from W again."""
        super().load_shared_state(state)
        if int(self.paca_indices.min()) < 0 or int(self.paca_indices.max()) >= self.in_features:
            raise ConfigError(f"paca_indices are not all columns of a layer with {self.in_features} inputs.")
        with torch.no_grad():
            self.paca_w.copy_(self._columns() / self.config.scale)

    def _delta(self) -> Tensor:
        return self.config.scale * self.paca_w - self._columns()

    def _columns(self) -> Tensor:
        return self.base_weight.detach().index_select(1, self.paca_indices).float()
