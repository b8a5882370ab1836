"""Which layers of a module an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from turnout.peft.config import AdapterConfig
from turnout.peft.layer import AdapterLayer
from turnout.wire.errors import ConfigError, unknown_name


def targets_of(module: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """Return the layers of ``module`` to adapt, by name.

    As in ``peft``: a list's entry means a layer of that name or whose name ends in ``.entry``, a text is a
    regular expression for the whole name, ``"all-linear"`` and None are every layer that can be adapted but
    the output embedding. Raises `ConfigError` when nothing fits, or something that fits cannot be adapted.
    """
    named = dict(module.named_modules())
    if any(isinstance(part, AdapterLayer) for part in named.values()):
        raise ConfigError("the model has adapters already; merge them, or start from a model without.")
    saved = set(saved_modules(module, config))
    free = {
        name: part
        for name, part in named.items()
        if name and not any(name == s or name.startswith(f"{s}.") for s in saved)
    }
    wanted = config.target_modules
    if wanted is None or wanted == "all-linear":
        output = _output_embedding(module)
        chosen = {
            n: p
            for n, p in free.items()
            if config.can_adapt(p) and p is not output and not _weight_is_read(named, n)
        }
    else:
        chosen = {n: p for n, p in free.items() if matches(n, wanted)}
    if not chosen and isinstance(wanted, tuple) and wanted:
        raise unknown_name("layer in target_modules", wanted[0], _adaptable(config, free))
    if config.exclude_modules is not None:
        chosen = {n: p for n, p in chosen.items() if not matches(n, config.exclude_modules)}
    chosen = dict(config.targets(module, chosen))
    if not chosen:
        raise ConfigError(
            f"target_modules={wanted!r} and exclude_modules={config.exclude_modules!r} leave no layer to "
            f"adapt. Layers that can be adapted: {', '.join(_adaptable(config, free)) or 'none'}."
        )
    for name, part in chosen.items():
        if _weight_is_read(named, name):
            raise ConfigError(
                f"{name!r} cannot be adapted: torch's MultiheadAttention reads its weight and never calls "
                "it; leave it out with exclude_modules."
            )
        if not config.can_adapt(part):
            kinds = ", ".join(kind.__name__ for kind in config.adapts)
            raise ConfigError(
                f"target_modules={wanted!r} names {name!r}, a {type(part).__name__}; {type(config).__name__} "
                f"adapts {kinds}."
            )
    return chosen


def saved_modules(module: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """Return the modules that train whole, by name. Raises `ConfigError` for a name that nothing has."""
    chosen: dict[str, nn.Module] = {}
    named = dict(module.named_modules())
    for wanted in config.modules_to_save or ():
        found = {name: part for name, part in named.items() if name and matches(name, (wanted,))}
        if not found:
            raise unknown_name("module in modules_to_save", wanted, [name for name in named if name])
        chosen |= found
    inner = {n for n in chosen if any(n != o and n.startswith(f"{o}.") for o in chosen)}
    return {name: part for name, part in chosen.items() if name not in inner}


def matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    """Return whether ``wanted`` means the module ``name``; `ConfigError` for a bad regular expression."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error as error:
            raise ConfigError(
                f"target_modules={wanted!r} is not a regular expression ({error}); give a list for names."
            ) from error
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted)


def _weight_is_read(named: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether the layer ``name`` is one whose parent uses its weight without calling it."""
    return isinstance(named[name.rpartition(".")[0]], nn.MultiheadAttention)


def _output_embedding(module: nn.Module) -> nn.Module | None:
    # As transformers models have it; its weight is often the input embedding's.
    getter = getattr(module, "get_output_embeddings", None)
    try:
        output = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return output if isinstance(output, nn.Module) else None


def _adaptable(config: AdapterConfig, free: Mapping[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, part in free.items() if config.can_adapt(part)})
