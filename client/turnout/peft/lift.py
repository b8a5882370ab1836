"""LIFT trains principal weights, the largest entries of a low-rank approximation (arXiv 2506.00772)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer, weight_of
from turnout.tasks.validation import check_count
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register


@register(
    "lift", kind="adapter", paper="2506.00772", summary="Sparse training of the principal weights (LIFT)"
)
@dataclass(frozen=True, kw_only=True)
class LiftConfig(AdapterConfig):
    """LIFT: of each weight, the ``k = min((d_out + d_in) r, d_out d_in)`` principal entries are trained.

    Principal are the largest absolute entries of the weight's approximation of rank ``filter_rank``. What
    travels is k numbers per layer, in the order of the entries; their places are handed out by the server.

    Attributes
    ----------
    r
        Budget: as many numbers as LoRA of this rank has.
    filter_rank
        Rank of the approximation; at the full rank, the entries are those of largest magnitude.
    update_interval
        Rounds after which the server picks the entries anew; by default never. Needs a strategy that
        remembers no vector of its clients.
    niter
        Power iterations of a randomised decomposition; by default it is exact.
    """

    aggregation: ClassVar[Aggregation] = "exact"
    shares: ClassVar[bool] = True

    r: int = 128
    filter_rank: int = 128
    update_interval: int | None = None
    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank()
        self.check_rank("filter_rank")
        for field in ("update_interval", "niter"):
            if getattr(self, field) is not None:
                check_count(field, getattr(self, field), low=1)

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Lift:
        """Return the adapter of ``base_layer``, its entries picked from the base's weight."""
        return Lift(base_layer, self, self.principal(weight_of(base_layer), name))

    @property
    def refresh_interval(self) -> int | None:
        """``update_interval``."""
        return self.update_interval

    def refresh(self, layers: Mapping[str, AdapterLayer]) -> None:
        """Pick the principal entries anew, see `Lift.refresh`."""
        for name, layer in layers.items():
            cast(Lift, layer).refresh(name)

    def principal(self, weight: Tensor, name: str) -> Tensor:
        """Return the flat indices (k,) of the principal entries of ``weight``, ascending."""
        d_out, d_in = weight.shape
        k = min((d_out + d_in) * self.r, d_out * d_in)
        filtered = low_rank(weight, self.filter_rank, self.niter, self.generator(name))
        # A stable order, so that ties go to the first entry on every machine.
        return filtered.abs().reshape(-1).argsort(descending=True, stable=True)[:k].sort().values


def low_rank(weight: Tensor, rank: int, niter: int | None, generator: torch.Generator) -> Tensor:
    """Return the approximation of ``weight`` of rank ``rank``, on the CPU: float64, or randomised in float32.

    The randomised one (``niter`` power iterations) works on ``2 rank`` random directions drawn by
    ``generator``.
    """
    matrix = weight.detach().to("cpu", torch.float64 if niter is None else torch.float32)
    rank = min(rank, *matrix.shape)
    if niter is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return cast(Tensor, (u[:, :rank] * s[:rank]) @ vh[:rank])
    directions = min(2 * rank, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], directions, generator=generator)
    for _ in range(niter):
        basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
    q = torch.linalg.qr(basis).Q
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return cast(Tensor, (q @ u[:, :rank] * s[:rank]) @ vh[:rank])


class Lift(AdapterLayer):
    """A linear layer with trained changes ``lift_values`` (k,) of the entries ``lift_index`` (k,).

    ``settled_values`` at ``settled_index`` are changes of entries that were principal before. Indices are
    flat, row-major, int32.
    """

    config: LiftConfig
    shared_names = ("lift_index", "settled_index", "settled_values")

    def __init__(self, base_layer: nn.Module, config: LiftConfig, index: Tensor) -> None:
        super().__init__(base_layer, config)
        if self.weight.numel() >= 2**31:
            raise ConfigError(
                f"a weight with {self.weight.numel()} entries is too large for lift; exclude it."
            )
        self.lift_index: Tensor
        self.settled_index: Tensor
        self.settled_values: Tensor
        self.register_buffer("lift_index", index.to(torch.int32))
        self.register_buffer("settled_index", torch.empty(0, dtype=torch.int32))
        self.register_buffer("settled_values", torch.empty(0))
        self.lift_values = nn.Parameter(torch.zeros(len(index)))

    def delta_weight(self) -> Tensor:
        """Return the changes in their places, zeros elsewhere."""
        flat = self.lift_values.new_zeros(self.base_weight.numel())
        flat = flat.index_add(0, self.settled_index, self.settled_values)
        return flat.index_add(0, self.lift_index, self.lift_values).view(self.base_weight.shape)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Take over the entries; the changes start from 0 again. Settled ones may differ in number."""
        self._check(state)
        for name in self.shared_names:
            setattr(self, name, state[name].detach().clone().to(self.lift_values.device))
        with torch.no_grad():
            self.lift_values.zero_()

    def refresh(self, name: str) -> Tensor:
        """Pick the entries anew, from the present weight; the layer's function does not change.

        Returns where the new entries were before: their old positions (k,), -1 for one that enters. Changes
        of entries that leave are settled, those that stay go on from where they are.
        """
        with torch.no_grad():
            total = self.delta_weight().reshape(-1)
            index = self.config.principal(self.base_weight.float() + total.view(self.weight.shape), name)
            old = torch.full((total.numel(),), -1, dtype=torch.int64)
            old[self.lift_index.long()] = torch.arange(len(self.lift_index))
            values, rest = total[index], total.clone()
            rest[index] = 0
            self.settled_index = rest.nonzero().reshape(-1).to(torch.int32)
            self.settled_values = rest[self.settled_index]
            self.lift_index = index.to(torch.int32)
            self.lift_values.copy_(values)
        return old[index]

    def _check(self, state: dict[str, Tensor]) -> None:
        """Raise `ConfigError` for what cannot be entries of this layer: it came over the network."""
        if set(state) != set(self.shared_names):
            raise ConfigError(
                f"shared state has {sorted(state)}, the layer needs {sorted(self.shared_names)}."
            )
        index, settled, values = (state[name] for name in self.shared_names)
        entries = self.weight.numel()
        fits = index.shape == self.lift_index.shape and settled.dim() == 1 and values.shape == settled.shape
        for places in (index, settled):
            fits = fits and places.dtype == torch.int32 and bool((places.diff() > 0).all())
            fits = fits and (len(places) == 0 or (int(places[0]) >= 0 and int(places[-1]) < entries))
        if not fits or values.dtype != torch.float32 or not bool(torch.isfinite(values).all()):
            raise ConfigError(f"lift_index and settled entries do not fit a weight with {entries} entries.")
