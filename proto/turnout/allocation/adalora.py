"""AdaLoRA's rank allocation over all layers (arXiv 2303.10512, Algorithm 1), on the server.

The server has the global step counter: rounds times local steps. A client that counted its own steps would
start every round in the warm-up, and clients that prune alone would exceed the budget together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from turnout.allocation.allocator import Allocator, ModelView
from turnout.allocation.narrow import Sides
from turnout.allocation.schedule import CubicSchedule
from turnout.allocation.shares import keep_top
from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError

TRIPLETS: Final[Sides] = {
    "lora_A": ("rank_mask", 0),
    "lora_B": ("rank_mask", 1),
    "lora_E": ("rank_mask", 0),
}
"""Which side of each tensor counts triplets."""


@dataclass(frozen=True, kw_only=True)
class AdaLoraAllocator(Allocator):
    """Zero the singular values of the least important triplets, as the cubic budget falls.

    The fields are those of the adapter's config; ``local_steps`` is what a client takes in a round. Triplets
    are scored by the participants' mean of what they report. Until the last phase a zeroed value may
    come back; then the mask is fixed, travels, and the layers apply it.

    ``largest`` keeps of every layer as many triplets as it has among the best, and of them the largest: for
    triplets that the server itself decomposed, of which no scores are known and the largest are the best
    approximation. What is fixed in the last phase is then each layer's rank.
    """

    decided: ClassVar[tuple[str, ...]] = ("rank_mask",)
    narrows: ClassVar[Sides] = TRIPLETS

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - the name in HF peft
    total_step: int
    local_steps: int | None
    largest: bool = False

    def __post_init__(self) -> None:
        self.schedule(1)
        if self.local_steps is None:
            raise ConfigError(
                "the rank schedule of adalora counts optimizer steps, but client.local_steps is not set; set "
                "it (and not local_epochs), so that all clients take the same number."
            )

    def schedule(self, layers: int) -> CubicSchedule:
        """Return the budget in triplets for ``layers`` adapted layers."""
        return CubicSchedule(
            layers * self.init_r, layers * self.target_r, self.tinit, self.tfinal, self.total_step
        )

    def allocate(self, server_round: int, model: ModelView) -> None:
        """Zero ``lora_E`` outside the budget's best triplets; fix ``rank_mask`` in the last phase."""
        assert self.local_steps is not None
        step, before = server_round * self.local_steps, (server_round - 1) * self.local_steps
        values = dict(model.ending("lora_E"))
        schedule = self.schedule(len(values))
        final = schedule.final(step)
        if final and schedule.final(before):
            kept = {prefix: mask.astype(bool) for prefix, mask in model.ending("rank_mask")}
        elif step > self.tinit and (final or step // self.deltaT > before // self.deltaT):
            kept = self._best(model, schedule.budget(step))
        else:
            return
        if self.largest:
            kept = {p: keep_top(np.abs(values[p][:, 0]), int(mask.sum())) for p, mask in kept.items()}
        for prefix, value in values.items():
            value[~kept[prefix]] = 0
            if final:
                model.buffers[f"{prefix}rank_mask"] = kept[prefix].astype(np.uint8)

    def _best(self, model: ModelView, budget: int) -> dict[str, NDArray]:
        scores = dict(model.ending("running_importance"))
        mask = keep_top(np.concatenate(list(scores.values())), budget)
        cuts = np.cumsum([len(score) for score in scores.values()])[:-1]
        return dict(zip(scores, np.split(mask, cuts), strict=True))
