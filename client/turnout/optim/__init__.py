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
from turnout.optim.loss_curvature_edit import (
    LayerCurvature,
    collect_curvature,
    edit_,
    editable_layers,
    restore_,
)

__all__ = [
    "BORep",
    "BinaryFieldConv2d",
    "BinaryFieldLinear",
    "FieldOptimizer",
    "Hypergradient",
    "LayerCurvature",
    "annealed",
    "collect_curvature",
    "descend_lower",
    "edit_",
    "editable_layers",
    "evaluate_with",
    "field_groups",
    "field_kl",
    "hypergradient",
    "refine_lower",
    "rescale_fields",
    "restore_",
    "set_noise",
    "set_temperature",
]
