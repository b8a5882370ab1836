"""Adapters: fine-tuning that trains, and sends, a small part of a model. One module per method."""

from __future__ import annotations

from turnout.peft.adapted_task import AdaptedTask
from turnout.peft.attach import Adapted, attach
from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer
from turnout.peft.lora import Lora, LoraConfig

__all__ = [
    "Adapted",
    "AdaptedTask",
    "AdapterConfig",
    "AdapterLayer",
    "Aggregation",
    "Lora",
    "LoraConfig",
    "attach",
]
