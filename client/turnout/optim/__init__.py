"""Optimizers, one file per paper: ``torch.optim.Optimizer`` subclasses for any PyTorch code.

Clients of a federation name them in the experiment file (``[client] optimizer = "frugal"``); their state
between rounds is an option there. Importing this package registers them.
"""

from __future__ import annotations

from turnout.optim.base import ModuleOptimizer, StatePolicy
from turnout.optim.classp import CLASSP
from turnout.optim.roles import parameter_roles

__all__ = ["CLASSP", "ModuleOptimizer", "StatePolicy", "parameter_roles"]
