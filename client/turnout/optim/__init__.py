"""Optimizers, one file per paper: ``torch.optim.Optimizer`` subclasses for any PyTorch code.

Clients of a federation name them in the experiment file (``[client] optimizer = "frugal"``); their state
between rounds is an option there. Importing this package registers them.
"""

from __future__ import annotations

from turnout.optim.auon import AuON, HybridAuON, newton_schulz
from turnout.optim.base import ModuleOptimizer, StatePolicy
from turnout.optim.classp import CLASSP
from turnout.optim.eco import ECOSGD, ECOAdamW
from turnout.optim.eggroll import EGGROLL
from turnout.optim.frugal import FRUGAL
from turnout.optim.quantizers import FixedGrid, Float8Grid, IntegerGrid, Quantizer
from turnout.optim.roles import parameter_roles

__all__ = [
    "CLASSP",
    "ECOSGD",
    "EGGROLL",
    "FRUGAL",
    "AuON",
    "ECOAdamW",
    "FixedGrid",
    "Float8Grid",
    "HybridAuON",
    "IntegerGrid",
    "ModuleOptimizer",
    "Quantizer",
    "StatePolicy",
    "newton_schulz",
    "parameter_roles",
]
