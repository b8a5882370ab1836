"""Adapters as folders of Hugging Face ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turnout.peft import rank_pattern
from turnout.peft.adalora import AdaLora, AdaLoraConfig
from turnout.peft.adapted import Adapted, attach
from turnout.peft.bone import BoneConfig
from turnout.peft.config import AdapterConfig
from turnout.peft.hub_formats import IGNORED, RENAMED_TENSORS, UNUSED, HubFormat, format_named, format_of
from turnout.peft.layer import is_transposed
from turnout.wire.errors import ConfigError, DataError, LayoutError

CONFIG_FILE: Final = "adapter_config.json"
MODEL_FILE: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_MAX_CONFIG_BYTES: Final = 1 << 20
# Ours alone: what the base is cast to is decided where the adapter is used.
_NEVER_SAVED: Final = frozenset({"base_dtype"})


def save_adapter(adapted: Adapted, folder: str | Path, *, base_model: str = "") -> Path:
    """Write the adapter into ``folder``, which is made if need be, and return it.

    ``base_model`` is the name of the model that it belongs on, for the reader. ``peft`` reads the folder
    if it has the method.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    form = format_of(adapted.config)
    pattern = rank_pattern.pattern_of(adapted)
    state = rank_pattern.narrowed({**_trained_state(adapted, form), **_saved_state(adapted, form)}, pattern)
    tensors = {
        _PREFIX + _their_name(name, adapted, form): tensor.detach().cpu().contiguous().clone()
        for name, tensor in state.items()
    }
    save_file(tensors, folder / MODEL_FILE, {"format": "pt"})
    document = _document(adapted, form) | {"base_model_name_or_path": base_model or None}
    if pattern:
        document["rank_pattern"] = rank_pattern.written(pattern)
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def load_adapter(module: nn.Module, folder: str | Path, *, base_dtype: str | None = None) -> Adapted:
    """Put the adapter of ``folder`` on ``module``, in place, and return its handle.

    Raises `DataError` for a folder without such files, `ConfigError` for a configuration with something that
    Turnout does not have, `LayoutError` for tensors that are not those of the configuration on this module.
    """
    folder = Path(folder)
    config, form = read_config(folder)
    if base_dtype is not None:
        config = replace(config, base_dtype=base_dtype)
    pattern = _rank_pattern(folder, config)
    tensors = rank_pattern.widened(_tensors(folder), {_PREFIX + name: mask for name, mask in pattern.items()})
    adapted = attach(module, config)
    names = {
        _PREFIX + _their_name(name, adapted, form): name
        for name in (*adapted.trainable_state_dict(), *_saved_state(adapted, form))
    }
    if set(tensors) != set(names):
        raise LayoutError(
            f"{folder / MODEL_FILE} does not fit the model: missing {sorted(set(names) - set(tensors))[:3]}, "
            f"unknown {sorted(set(tensors) - set(names))[:3]}."
        )
    given = {names[name]: tensor for name, tensor in tensors.items()}
    saved = {name: given.pop(name) for name in _saved_state(adapted, form)}
    for own, load in (
        (adapted.shared_state(), adapted.load_shared_state),
        (adapted.allocation_state(), adapted.load_allocation_state),
    ):
        if own:
            load({name: saved.get(name, tensor) for name, tensor in own.items()})
    adapted.load_trainable_state_dict({name: tensor.float() for name, tensor in given.items()})
    for name, mask in pattern.items():
        cast(AdaLora, adapted.layers[name]).rank_mask.copy_(torch.tensor(mask))
    return adapted


def _rank_pattern(folder: Path, config: AdapterConfig) -> rank_pattern.Pattern:
    if not isinstance(config, AdaLoraConfig):
        return {}
    document = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return rank_pattern.read(document.get("rank_pattern"), config.init_r)


def read_config(folder: str | Path) -> tuple[AdapterConfig, HubFormat]:
    """Return the configuration in ``folder`` and its form; raises as `load_adapter` does."""
    path = Path(folder) / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise DataError(f"{path} has more than {_MAX_CONFIG_BYTES} bytes, which no configuration has.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); name a folder saved by peft or Turnout."
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("peft_type"), str):
        raise DataError(f"{path} is no adapter's configuration: peft_type is missing.")
    form = format_named(document.pop("peft_type"))
    known = {f.name: f for f in fields(form.config)}
    options: dict[str, Any] = {}
    for name, value in document.items():
        if name in UNUSED.get(form.peft_type, ()) or name in IGNORED:
            continue
        if name in known and name not in form.left_out:
            options[name] = tuple(value) if isinstance(value, list) else value
        elif value not in (None, False, "none", [], {}) and form.options.get(name) != value:
            raise ConfigError(
                f"{name}={value!r} in {path}: Turnout's {form.config.__name__} has no such option."
            )
    for name in [n for n, v in options.items() if v is None and known[n].default not in (None, MISSING)]:
        del options[name]  # "Not set", to them.
    if options.get("init_weights") == "bat":  # Both are one type to them.
        return BoneConfig(**options), form
    return form.config(**options), form


def _document(adapted: Adapted, form: HubFormat) -> dict[str, Any]:
    """Return what the configuration file holds: layers by their names where the adapter found them itself."""
    config = adapted.config
    document: dict[str, Any] = {"peft_type": form.peft_type, **form.options}
    for f in fields(config):
        if f.name not in form.left_out | _NEVER_SAVED and not (form.in_peft and f.name == "seed"):
            value = getattr(config, f.name)
            document[f.name] = list(value) if isinstance(value, tuple) else value
    if any(is_transposed(layer.base_layer) for layer in adapted.layers.values()):
        document["fan_in_fan_out"] = True  # For `peft`; here the layer itself tells.
    if config.target_modules is None:
        document["target_modules"] = sorted(adapted.layers)
    return document


def _saved_state(adapted: Adapted, form: HubFormat) -> dict[str, Tensor]:
    """Return the shared tensors that the adapter's function depends on; not the scores, for training."""
    if form.in_peft:
        return {}  # Theirs have none: what a mask does is in the tensors.
    return {
        name: tensor
        for name, tensor in {**adapted.shared_state(), **adapted.allocation_state()}.items()
        if not name.rpartition(".")[2].startswith("running_")
    }


def _trained_state(adapted: Adapted, form: HubFormat) -> dict[str, Tensor]:
    """Return what was trained, as the form wants it."""
    state = adapted.trainable_state_dict()
    for name in state:
        path, _, last = name.rpartition(".")
        if path in adapted.layers and last in form.attributes:
            state[name] = getattr(adapted.layers[path], form.attributes[last])
    return state


def _their_name(name: str, adapted: Adapted, form: HubFormat) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.{form.tensors.get(last, last)}" if path in adapted.layers else name


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    path = folder / MODEL_FILE
    if not path.is_file():
        hint = " Only safetensors are read, never pickles." if (folder / "adapter_model.bin").exists() else ""
        raise DataError(f"{path} is missing.{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    renamed = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".")
        renamed[f"{head}.{RENAMED_TENSORS.get(last, last)}"] = tensor
    return renamed


def merged_module(adapted: Adapted) -> nn.Module:
    """Merge the adapter and return its module, in place, with plain layers and no adapters."""
    adapted.merge()
    for name, layer in adapted.layers.items():
        parent, _, child = name.rpartition(".")
        setattr(adapted.module.get_submodule(parent), child, layer.base_layer)
    return adapted.module


def save_merged(adapted: Adapted, folder: str | Path) -> Path:
    """Merge the adapter, write the model into ``folder`` and return it.

    A ``transformers`` model writes itself (``save_pretrained``), others their state dict as
    ``model.safetensors``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    module = merged_module(adapted)
    return save_model(module, folder)


def save_model(module: nn.Module, folder: Path) -> Path:
    """Write ``module`` into ``folder`` as it is and return the folder."""
    writer = getattr(module, "save_pretrained", None)
    if callable(writer):
        writer(folder)
        return folder
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
