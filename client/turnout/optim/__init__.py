"""Optimizers and trainers, one file per paper, for any PyTorch code.

Clients of a federation name the optimizers in the experiment file (``[client] optimizer = "frugal"``); their
state between rounds is an option there. Importing this package registers them.
"""

from __future__ import annotations

from turnout.optim.auon import AuON, HybridAuON, newton_schulz
from turnout.optim.base import ModuleOptimizer, StatePolicy
from turnout.optim.bilevel import Hypergradient, descend_lower, hypergradient, refine_lower
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
from turnout.optim.classp import CLASSP
from turnout.optim.coded_layers import CodedLinear, coded_
from turnout.optim.eco import ECOSGD, ECOAdamW
from turnout.optim.eggroll import EGGROLL
from turnout.optim.field_space_continual import FieldOptimizer, annealed, field_groups
from turnout.optim.frugal import FRUGAL
from turnout.optim.loss_curvature_edit import (
    LayerCurvature,
    collect_curvature,
    edit_,
    editable_layers,
    restore_,
)
from turnout.optim.quantizers import FixedGrid, Float8Grid, IntegerGrid, Quantizer
from turnout.optim.roles import parameter_roles

__all__ = [
    "CLASSP",
    "ECOSGD",
    "EGGROLL",
    "FRUGAL",
    "AuON",
    "BORep",
    "BinaryFieldConv2d",
    "BinaryFieldLinear",
    "CodedLinear",
    "ECOAdamW",
    "FieldOptimizer",
    "FixedGrid",
    "Float8Grid",
    "HybridAuON",
    "Hypergradient",
    "IntegerGrid",
    "LayerCurvature",
    "ModuleOptimizer",
    "Quantizer",
    "StatePolicy",
    "annealed",
    "coded_",
    "collect_curvature",
    "descend_lower",
    "edit_",
    "editable_layers",
    "evaluate_with",
    "field_groups",
    "field_kl",
    "hypergradient",
    "newton_schulz",
    "parameter_roles",
    "refine_lower",
    "rescale_fields",
    "restore_",
    "set_noise",
    "set_temperature",
]
