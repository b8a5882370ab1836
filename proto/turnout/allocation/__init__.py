"""What an adapter lets the server do between rounds: decide budgets, masks, layers; average dense updates.

NumPy only. An allocator works on the aggregated model alone, so it goes with every strategy, and a run
resumes without further state: what it decides travels to the clients as buffers beside the parameters.
"""

from __future__ import annotations

from turnout.allocation.adalora import AdaLoraAllocator
from turnout.allocation.allocator import Allocator, ModelView
from turnout.allocation.dense_form import DenseForm, KernelForm, LowRankForm, NetworkForm
from turnout.allocation.ist import IstAllocator, centred_rewards, draw_layers, score_change
from turnout.allocation.narrow import KeptPart, Sides, kept_parts, narrowed, widened
from turnout.allocation.schedule import CubicSchedule
from turnout.allocation.shares import keep_top, share_out
from turnout.allocation.snella import SnellaAllocator

__all__ = [
    "AdaLoraAllocator",
    "Allocator",
    "CubicSchedule",
    "DenseForm",
    "IstAllocator",
    "KeptPart",
    "KernelForm",
    "LowRankForm",
    "ModelView",
    "NetworkForm",
    "Sides",
    "SnellaAllocator",
    "centred_rewards",
    "draw_layers",
    "keep_top",
    "kept_parts",
    "narrowed",
    "score_change",
    "share_out",
    "widened",
]
