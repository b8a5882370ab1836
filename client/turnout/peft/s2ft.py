"""S2FT: a few channels and heads of each block are trained as dense slices (arXiv 2412.06289).

Here in index form, ``W[:, idx] += s2`` or ``W[idx, :] += s2``: the same model as with weights that were
permuted to make the slices contiguous (`turnout.peft.co_permutation`), and indices are the original ones
everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer, weight_of
from turnout.peft.selected import add_inputs, add_outputs, dense
from turnout.peft.targets import matches
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_RATIOS: Final = ("d_ratio", "u_ratio", "o_ratio", "v_ratio")


@register(
    "s2ft", kind="adapter", paper="2412.06289", summary="Selected channels and heads as dense slices (S2FT)"
)
@dataclass(frozen=True, kw_only=True)
class S2ftConfig(AdapterConfig):
    """S2FT: of all channels of a kind of layer in the model, a random share is trained.

    A channel is an input column of a down projection or an output row of an up projection; a head is
    ``head_dim`` columns of an attention output projection or rows of a value projection. Each kind has its
    pool over all layers, so that the numbers of picked channels differ between layers; a layer without any
    stays as it is. What travels is one number per weight of a picked channel.

    Attributes
    ----------
    target_modules
        The down projections, or whichever layers are trained by input columns.
    d_ratio
        Share of the channels of ``target_modules``.
    u_ratio
        Share of the channels of ``up_modules``.
    o_ratio
        Share of the heads of ``o_modules``.
    v_ratio
        Share of the heads of ``v_modules``.
    up_modules, o_modules, v_modules
        Names of these layers, in the form of ``target_modules``.
    head_dim
        Width of a head, needed for ``o_ratio`` and ``v_ratio``; with grouped queries, o's is that of a whole
        group.
    """

    aggregation: ClassVar[Aggregation] = "exact"
    shares: ClassVar[bool] = True

    d_ratio: float = 0.03
    u_ratio: float = 0.0
    o_ratio: float = 0.0
    v_ratio: float = 0.0
    up_modules: str | tuple[str, ...] = ("up_proj",)
    o_modules: str | tuple[str, ...] = ("o_proj",)
    v_modules: str | tuple[str, ...] = ("v_proj",)
    head_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in _RATIOS:
            check_number(field, getattr(self, field), low=0, high=1)
        if not any(getattr(self, field) for field in _RATIOS):
            raise ConfigError(
                "d_ratio=0 and the other ratios are 0 too: nothing is trained; set one above 0."
            )
        if self.o_ratio or self.v_ratio:
            if self.head_dim is None:
                raise ConfigError("head_dim is missing: o_ratio and v_ratio pick heads of that width.")
            check_count("head_dim", self.head_dim, low=1)

    def targets(self, module: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Return the layers of every kind that has a ratio above 0."""
        found = dict(chosen) if self.d_ratio else {}
        for names, ratio in (
            (self.up_modules, self.u_ratio),
            (self.o_modules, self.o_ratio),
            (self.v_modules, self.v_ratio),
        ):
            if ratio:
                found |= {
                    n: p for n, p in module.named_modules() if isinstance(p, nn.Linear) and matches(n, names)
                }
        return found

    def layers(self, targets: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the adapters of the layers in which something was picked. Raises `ConfigError` for none."""
        made: dict[str, AdapterLayer] = {}
        rest = dict(targets)
        for kind, names, ratio, width, dim in (
            ("up", self.up_modules, self.u_ratio, 1, 0),
            ("o", self.o_modules, self.o_ratio, self.head_dim or 1, 1),
            ("v", self.v_modules, self.v_ratio, self.head_dim or 1, 0),
            ("down", r".*", self.d_ratio, 1, 1),
        ):
            if ratio:
                pool = {name: rest.pop(name) for name in list(rest) if matches(name, names)}
                for name, index in self._picked(kind, pool, ratio, width, dim).items():
                    made[name] = S2ft(pool[name], self, index, dim)
        if not made:
            raise ConfigError("the ratios pick no channel of this model; raise them, or adapt more layers.")
        return made

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """Return the adapter of ``base_layer`` with channels picked from this layer alone."""
        return self.layers({name: base_layer})[name]

    def _picked(
        self, kind: str, pool: Mapping[str, nn.Module], ratio: float, width: int, dim: int
    ) -> dict[str, Tensor]:
        """Return sorted indices by layer: ``int(ratio * N)`` of the pool's N units of ``width`` channels."""
        names = sorted(pool)
        units = []
        for name in names:
            channels = weight_of(pool[name]).shape[dim]
            if channels % width:
                raise ConfigError(f"head_dim={width} does not divide the {channels} channels of {name!r}.")
            units.append(channels // width)
        total = sum(units)
        order = torch.randperm(total, generator=self.generator(f"s2ft {kind}"))[: int(ratio * total)]
        picked, start = {}, 0
        for name, count in zip(names, units, strict=True):
            mine = order[(order >= start) & (order < start + count)].sort().values - start
            if len(mine):
                picked[name] = (mine[:, None] * width + torch.arange(width)).reshape(-1)
            start += count
        return picked


class S2ft(AdapterLayer):
    """A linear layer with a trained slice ``s2``, (d_out, s) or (s, d_in), at ``s2_indices`` (s,).

    ``dim`` is 1 where inputs were picked, 0 where outputs were.
    """

    config: S2ftConfig
    shared_names = ("s2_indices",)

    def __init__(self, base_layer: nn.Module, config: S2ftConfig, indices: Tensor, dim: int) -> None:
        super().__init__(base_layer, config)
        self.dim = dim
        self.s2_indices: Tensor
        self.register_buffer("s2_indices", indices)
        shape = list(self.weight.shape)
        shape[dim] = len(indices)
        self.s2 = nn.Parameter(torch.zeros(shape))

    def delta_weight(self) -> Tensor:
        """Return the slice in its place, zeros elsewhere."""
        return dense(self.weight.shape, self.dim, self.s2_indices, self.s2)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the base layer's output with the slice's added; backward needs the selected inputs only."""
        add = add_inputs if self.dim == 1 else add_outputs
        return add(self.base_layer(x), x, self.s2_indices, self.s2)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Take over the channels; the slice starts from 0 again."""
        super().load_shared_state(state)
        channels = self.weight.shape[self.dim]
        if int(self.s2_indices.min()) < 0 or int(self.s2_indices.max()) >= channels:
            raise ConfigError(f"s2_indices are not all channels of a layer that has {channels}.")
        with torch.no_grad():
            self.s2.zero_()
