"""Adapters: fine-tuning that trains, and sends, a small part of a model. One module per method."""

from __future__ import annotations

from turnout.peft.adalora import AdaLoraConfig
from turnout.peft.adapted import Adapted, attach
from turnout.peft.adapted_task import AdaptedTask
from turnout.peft.bone import BoneConfig, MissConfig
from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.hut import HutConfig
from turnout.peft.ist import IstConfig
from turnout.peft.layer import AdapterLayer
from turnout.peft.lift import LiftConfig
from turnout.peft.lift_adamw import LiftAdamW
from turnout.peft.lora import LoraConfig
from turnout.peft.paca import PacaConfig
from turnout.peft.s2ft import S2ftConfig
from turnout.peft.saving import load_adapter, merged_module, save_adapter, save_merged
from turnout.peft.snella import SnellaConfig
from turnout.peft.tera import TeraConfig
from turnout.peft.weight_compander import Compander, WeightCompanderConfig

__all__ = [
    "AdaLoraConfig",
    "Adapted",
    "AdaptedTask",
    "AdapterConfig",
    "AdapterLayer",
    "Aggregation",
    "BoneConfig",
    "Compander",
    "HutConfig",
    "IstConfig",
    "LiftAdamW",
    "LiftConfig",
    "LoraConfig",
    "MissConfig",
    "PacaConfig",
    "S2ftConfig",
    "SnellaConfig",
    "TeraConfig",
    "WeightCompanderConfig",
    "attach",
    "load_adapter",
    "merged_module",
    "save_adapter",
    "save_merged",
]
