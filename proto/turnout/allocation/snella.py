"""SNELLA's competition between layers for non-zero weights (arXiv 2510.24037), on the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from turnout.allocation.allocator import Allocator, ModelView
from turnout.allocation.schedule import CubicSchedule
from turnout.allocation.shares import share_out
from turnout.wire.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SnellaAllocator(Allocator):
    """Share out a falling number of non-zeros over the layers, by the importance that clients report.

    The fields are those of the adapter's config; ``local_steps`` is what a client takes in a round. Each
    layer is sent ``num_kept``, the number of entries of its update that may be non-zero.
    """

    decided: ClassVar[tuple[str, ...]] = ("num_kept",)

    init_sparsity: float = 0.0
    target_sparsity: float = 0.3
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - AdaLoRA's name in HF peft
    total_step: int
    local_steps: int | None

    def __post_init__(self) -> None:
        self.schedule(1)
        if self.local_steps is None:
            raise ConfigError(
                "the sparsity schedule of snella counts optimizer steps, but client.local_steps is not set; "
                "set it (and not local_epochs), so that all clients take the same number."
            )

    def schedule(self, entries: int) -> CubicSchedule:
        """Return the budget of non-zeros for layers of ``entries`` weights in all."""
        first, last = (round((1 - ratio) * entries) for ratio in (self.init_sparsity, self.target_sparsity))
        return CubicSchedule(first, last, self.tinit, self.tfinal, self.total_step)

    def allocate(self, server_round: int, model: ModelView) -> None:
        """Set ``num_kept`` of every layer."""
        assert self.local_steps is not None
        step, before = server_round * self.local_steps, (server_round - 1) * self.local_steps
        factors = {name: dict(model.ending(name)) for name in ("In_Qs", "Out_Qs")}
        sizes = {
            prefix: inner.shape[1] * factors["Out_Qs"][prefix].shape[1]
            for prefix, inner in factors["In_Qs"].items()
        }
        caps = np.array(list(sizes.values()), np.int64)
        schedule = self.schedule(int(caps.sum()))
        if schedule.final(before) or (step and step // self.deltaT == before // self.deltaT):
            return
        scores = dict(model.ending("running_importance"))
        ordered = np.array([float(scores[prefix].sum()) for prefix in sizes])
        budget = schedule.budget(step)
        for prefix, kept in zip(sizes, share_out(budget, ordered, caps).tolist(), strict=True):
            model.buffers[f"{prefix}num_kept"] = np.array([kept], np.int64)
