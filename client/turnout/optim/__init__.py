"""Optimizers and trainers of the method library, for any PyTorch code and for clients."""

from __future__ import annotations

from turnout.optim.binary_fields import (
    BinaryFieldConv2d,
    BinaryFieldLinear,
    evaluate_with,
    field_kl,
    rescale_fields,
    set_noise,
    set_temperature,
)
from turnout.optim.bo_rep import BORep
from turnout.optim.field_space_continual import FieldOptimizer, annealed, field_groups
from turnout.optim.hypergradient import Hypergradient, descend_lower, hypergradient, refine_lower

__all__ = [
    "BORep",
    "BinaryFieldConv2d",
    "BinaryFieldLinear",
    "FieldOptimizer",
    "Hypergradient",
    "annealed",
    "descend_lower",
    "evaluate_with",
    "field_groups",
    "field_kl",
    "hypergradient",
    "refine_lower",
    "rescale_fields",
    "set_noise",
    "set_temperature",
]
