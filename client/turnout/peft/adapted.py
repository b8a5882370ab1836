"""Putting adapters on a module: what is frozen, what is trained, what travels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from turnout.peft.config import DTYPES, AdapterConfig, Companion
from turnout.peft.layer import AdapterLayer, check_buffers
from turnout.peft.targets import saved_modules, targets_of
from turnout.tasks.travelling import declare_travelling, travelling
from turnout.wire.errors import ConfigError, LayoutError

_CONFIG: Final = "_turnout_adapter"
_COMPANIONS: Final = "_turnout_companions"


class Adapted:
    """A module with adapters on it; made by `attach`, or by `Adapted.of` for one that `attach` made before.

    ``config`` is the adapters' configuration and ``layers`` the adapters by the names of the layers that they
    replaced.
    """

    def __init__(self, module: nn.Module, config: AdapterConfig) -> None:
        self.module = module
        self.config = config
        self.layers = {n: part for n, part in module.named_modules() if isinstance(part, AdapterLayer)}
        names = getattr(module, _COMPANIONS, ())
        self.companions = {name: cast(Companion, module.get_submodule(name)) for name in names}

    @classmethod
    def of(cls, module: nn.Module) -> Adapted:
        """Return the handle of an adapted module, or of a copy of one. Raises `ConfigError` for another."""
        config = getattr(module, _CONFIG, None)
        if config is None:
            raise ConfigError(f"this {type(module).__name__} has no adapters; attach them first.")
        return cls(module, config)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return what is trained, by name: the adapters' parameters and the modules that train whole.

        That is what travels, but for `allocation_state`.
        """
        decided = set(self.allocation_state())
        return {
            name: tensor.detach() for name, tensor in travelling(self.module).items() if name not in decided
        }

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the trained tensors. Raises `LayoutError` for other names or shapes."""
        own = self.trainable_state_dict()
        if set(state) != set(own):
            raise LayoutError(
                f"the state does not fit the adapter: missing {sorted(set(own) - set(state))[:3]}, unknown "
                f"{sorted(set(state) - set(own))[:3]}."
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise LayoutError(
                    f"{name!r} has shape {tuple(state[name].shape)}, the adapter needs {tuple(tensor.shape)}."
                )
            tensor.copy_(state[name])

    def merge(self) -> None:
        """Put every adapter's change into the weight of its layer."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def delta_weights(self) -> dict[str, Tensor]:
        """Return each adapted layer's change of its weight, shape (d_out, d_in)."""
        with torch.no_grad():
            return {name: layer.delta_weight() for name, layer in self.layers.items()}

    def shared_state(self) -> dict[str, Tensor]:
        """Return what the server fixes once and hands out (indices, masks), by ``LAYER.NAME``."""
        return {
            f"{n}.{key}": t for n, layer in self.layers.items() for key, t in layer.shared_state().items()
        }

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `shared_state`. Raises `ConfigError` when it is not one of this module."""
        rest = dict(state)
        for name, layer in self.layers.items():
            prefix = f"{name}."
            mine = {key: rest.pop(prefix + key) for key in layer.shared_names if prefix + key in rest}
            if layer.shared_names or mine:
                layer.load_shared_state(mine)
        if rest:
            raise ConfigError(f"shared state {sorted(rest)[0]!r} belongs to no layer of this model.")

    def allocation_state(self) -> dict[str, Tensor]:
        """Return what travels beside the parameters (masks, budgets, scores), by name, themselves.

        Empty for adapters whose server decides nothing between rounds.
        """
        state = {
            f"{n}.{key}": cast(Tensor, getattr(layer, key))
            for n, layer in self.layers.items()
            for key in layer.travelling_names
        }
        for name, part in self.companions.items():
            state |= {f"{name}.{key}": tensor for key, tensor in part.state_dict(keep_vars=True).items()}
        return state

    def load_allocation_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy an `allocation_state`. Raises `ConfigError` for other names, shapes or dtypes."""
        own = self.allocation_state()
        check_buffers(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])


def attach(module: nn.Module, config: AdapterConfig) -> Adapted:
    """Freeze ``module``, in place, and put adapters on the layers that ``config`` names.

    What travels afterwards are the adapters' parameters and the modules to save, in float32. Frozen batch
    norm uses its stored statistics in training too. Raises `ConfigError` for layers that cannot be adapted.
    """
    targets = targets_of(module, config)
    saved = saved_modules(module, config)
    module.requires_grad_(False)
    if config.base_dtype is not None:
        module.to(DTYPES[config.base_dtype])
        module.register_forward_pre_hook(partial(_to, DTYPES[config.base_dtype]))
        module.register_forward_hook(_output_in_float32)
    for name, layer in config.layers(targets).items():
        parent, _, child = name.rpartition(".")
        layer.train(targets[name].training)  # A model in evaluation mode stays in it.
        setattr(module.get_submodule(parent), child, layer)
    travels = set()
    for name, part in module.named_modules():
        if isinstance(part, AdapterLayer):
            travels |= {f"{name}.{key}" for key, p in part.named_parameters() if p.requires_grad}
            travels |= {f"{name}.{key}" for key in part.travelling_names}
    companions = config.companions(Adapted(module, config).layers)
    for name, part in companions.items():
        module.add_module(name, part)
        travels |= {f"{name}.{key}" for key in part.state_dict(keep_vars=True)}
    setattr(module, _COMPANIONS, tuple(companions))
    for name, part in saved.items():
        _train_whole(part)
        travels |= {f"{name}.{key}" for key in part.state_dict(keep_vars=True)}
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            # In evaluation it would go past its linear layers, by their weights, for these two activations.
            part.activation_relu_or_gelu = 0
    trained = {id(inner) for part in saved.values() for inner in part.modules()}
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and id(part) not in trained:
            part.__class__ = _frozen_norm(type(part))  # type: ignore[assignment,arg-type]
            part.eval()
    declare_travelling(module, travels)
    setattr(module, _CONFIG, config)
    return Adapted(module, config)


def _train_whole(part: nn.Module) -> None:
    """Make ``part`` trainable in float32, whatever reaches it from a 16-bit base."""
    half = any(p.dtype != torch.float32 for p in part.parameters() if p.is_floating_point())
    part.float().requires_grad_(True)
    if half:
        part.register_forward_pre_hook(partial(_to, torch.float32))


def _to(dtype: torch.dtype, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _output_in_float32(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Losses and metrics of 16-bit numbers would be off in the third digit."""
    return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output


@cache
def _frozen_norm(kind: type[nn.Module]) -> type[nn.Module]:
    """Return ``kind`` as a class whose modules stay in evaluation mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return nn.Module.train(self, False)

    return cast("type[nn.Module]", type(f"Frozen{kind.__name__}", (kind,), {"train": train}))
