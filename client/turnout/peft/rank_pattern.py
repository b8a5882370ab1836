"""AdaLoRA's saved form in Hugging Face ``peft``: only the triplets that are left, and which ones they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from turnout.allocation.adalora import TRIPLETS
from turnout.peft.adalora import AdaLora
from turnout.peft.adapted import Adapted
from turnout.wire.errors import DataError

Pattern = dict[str, list[bool]]
"""By layer: of the initial triplets, those that are left."""

_SUFFIX: Final = ".lora_E"
# The side of a tensor that counts triplets.
_SIDES: Final = {name: side for name, (_, side) in TRIPLETS.items()}


def pattern_of(adapted: Adapted) -> Pattern:
    """Return the triplets that the masks leave; empty while all are left, or for another adapter."""
    masks = {
        name: layer.rank_mask.bool().tolist()
        for name, layer in adapted.layers.items()
        if isinstance(layer, AdaLora)
    }
    return {} if all(all(mask) for mask in masks.values()) else masks


def narrowed(tensors: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Tensor]:
    """Return ``tensors``, named by ``LAYER.NAME``, without the triplets that ``pattern`` drops."""
    made = dict(tensors)
    for layer, mask in pattern.items():
        places = torch.tensor(mask).nonzero().reshape(-1)
        for own, side in _SIDES.items():
            whole = tensors[f"{layer}.{own}"]
            made[f"{layer}.{own}"] = whole.index_select(side, places.to(whole.device))
    return made


def widened(tensors: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Tensor]:
    """Return ``tensors`` with zeros for the triplets that ``pattern`` drops.

    Raises `DataError` where the two do not fit together.
    """
    made = dict(tensors)
    for layer, mask in pattern.items():
        places = torch.tensor(mask).nonzero().reshape(-1)
        for own, side in _SIDES.items():
            name = f"{layer}.{own}"
            narrow = tensors.get(name)
            if narrow is None or narrow.dim() != 2 or narrow.shape[side] != len(places):
                raise DataError(
                    f"rank_pattern leaves {len(places)} triplets of {layer!r}; {name!r} has another number."
                )
            shape = list(narrow.shape)
            shape[side] = len(mask)
            made[name] = narrow.new_zeros(shape).index_copy(side, places, narrow)
    return made


def written(pattern: Pattern) -> Pattern:
    """Return ``pattern`` as ``peft`` writes it."""
    return {f"{layer}{_SUFFIX}": mask for layer, mask in pattern.items()}


def read(value: Any, init_r: int) -> Pattern:
    """Return the pattern of a configuration file; raises `DataError` for what cannot be one."""
    if value is None:
        return {}
    pattern: Pattern = {}
    entries: dict[str, Any] = value if isinstance(value, dict) else {"": None}
    for name, mask in entries.items():
        fits = isinstance(mask, list) and len(mask) == init_r and set(map(type, mask)) == {bool}
        if not fits or not name.endswith(_SUFFIX):
            raise DataError(
                f"rank_pattern has {name!r}: {str(mask)[:40]}; it must hold lists of init_r={init_r} truth "
                "values by names that end in .lora_E."
            )
        pattern[name.removesuffix(_SUFFIX)] = mask
    return pattern
