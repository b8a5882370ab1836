"""Adapters: fine-tuning that trains, and sends, a small part of a model. One module per method."""

from __future__ import annotations

from turnout.peft.adapted_task import AdaptedTask
from turnout.peft.attach import Adapted, attach
from turnout.peft.bone import BoneConfig, MissConfig
from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer
from turnout.peft.lift import LiftConfig
from turnout.peft.lift_adamw import LiftAdamW
from turnout.peft.lora import LoraConfig
from turnout.peft.paca import PacaConfig
from turnout.peft.s2ft import S2ftConfig

__all__ = [
    "Adapted",
    "AdaptedTask",
    "AdapterConfig",
    "AdapterLayer",
    "Aggregation",
    "BoneConfig",
    "LiftAdamW",
    "LiftConfig",
    "LoraConfig",
    "MissConfig",
    "PacaConfig",
    "S2ftConfig",
    "attach",
]
