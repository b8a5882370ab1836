"""How each method's configuration and tensors are called in a saved folder of Hugging Face ``peft``.

Methods that ``peft`` does not have are written in the same form under a type of their own, which only Turnout
reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from turnout.peft.adalora import AdaLoraConfig
from turnout.peft.bone import BoneConfig, MissConfig
from turnout.peft.config import AdapterConfig
from turnout.peft.lora import LoraConfig
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import methods


@dataclass(frozen=True)
class HubFormat:
    """One method's form.

    ``tensors`` maps our tensors' last names to theirs, where they differ. ``options`` are values that
    ``peft`` wants in the file and we have no field for. ``left_out`` are our fields that the file does not
    have. ``attributes`` says of tensors which attribute of the layer is saved in their place.
    """

    peft_type: str
    config: type[AdapterConfig]
    tensors: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def in_peft(self) -> bool:
        """Whether ``peft`` reads it."""
        return self in _IN_PEFT


_FACTORS: Final = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

_IN_PEFT: Final = (
    HubFormat("LORA", LoraConfig, _FACTORS, {"bias": "none"}, frozenset({"aggregation"})),
    HubFormat(
        "ADALORA",
        AdaLoraConfig,
        options={"bias": "none"},
        left_out=frozenset({"init_std", "aggregation"}),
        attributes={"lora_E": "singular_values"},
    ),
    HubFormat("MISS", MissConfig, {}, {"bias": "none"}),
    HubFormat("MISS", BoneConfig, {}, {"bias": "none"}),
)

# Fields of theirs that change nothing about a trained adapter's output.
IGNORED: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
        "fan_in_fan_out", "runtime_config", "megatron_core", "megatron_config", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying", "qalora_group_size",
    }
)  # fmt: skip
# The old name of MiSS, with its tensors' old prefix.
RENAMED_TYPES: Final = {"BONE": "MISS"}
RENAMED_TENSORS: Final = {"bone_block": "miss_block"}
# AdaLoRA inherits LoRA's fields and does not use these; its pattern is read with the tensors.
UNUSED: Final = {"ADALORA": frozenset({"r", "init_lora_weights", "use_rslora", "rank_pattern"})}


def format_of(config: AdapterConfig) -> HubFormat:
    """Return the form of ``config``'s method."""
    return format_of_class(type(config))


def format_of_class(config: type[AdapterConfig]) -> HubFormat:
    """Return the form of a class of configurations; raises `ConfigError` for one that is not registered."""
    for known in _formats():
        if known.config is config:
            return known
    raise ConfigError(f"{config.__name__} is not registered as an adapter; register it to save it.")


def format_named(peft_type: str) -> HubFormat:
    """Return the form of a file's ``peft_type``; an unknown one raises `ConfigError`."""
    peft_type = RENAMED_TYPES.get(peft_type, peft_type)
    known = {form.peft_type: form for form in reversed(_formats())}
    if peft_type not in known:
        raise unknown_name("peft_type", peft_type, known)
    return known[peft_type]


def _formats() -> list[HubFormat]:
    theirs = {form.config for form in _IN_PEFT}
    ours = [
        HubFormat(entry.slug.upper().replace("-", "_"), entry.target)
        for entry in methods("adapter")
        if entry.target not in theirs
    ]
    return [*_IN_PEFT, *ours]
