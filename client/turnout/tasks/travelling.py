"""Which tensors of a module travel between server and clients, and how the others are shared.

Of most modules all tensors travel. Of a module with adapters only what is trained does: the rest, the frozen
base, is one copy per process and device, however many models are made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from turnout.tasks.task import building
from turnout.wire.arrays import as_array
from turnout.wire.errors import LayoutError
from turnout.wire.layout import ParameterLayout

_NAMES: Final = "_turnout_travelling"

# Copies of frozen tensors on other devices, for as long as the original lives.
_placed: Final[Any] = WeakTensorKeyDictionary()


def travelling(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``module`` that travel, by name in ``state_dict`` order, themselves (no copies).

    That is the whole state dict unless `declare_travelling` said otherwise.
    """
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    names = getattr(module, _NAMES, None)
    return state if names is None else {name: state[name] for name in state if name in names}


def record_of(module: nn.Module) -> tuple[ArrayRecord, ParameterLayout]:
    """Return the tensors of ``module`` that travel as a record, without copying on a CPU, and their layout.

    Raises `LayoutError` for a module that cannot be trained as one flat vector: one that shares a parameter
    under two names, mixes dtypes, or trains what would travel as a statistic.
    """
    state, record, seen = travelling(module), ArrayRecord(), dict[int, str]()
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            raise LayoutError(
                f"parameter {name!r} is {tensor.dtype}; make the whole model torch.float32 (clients multiply "
                "in bfloat16 with precision='bf16-mixed')."
            )
        record[name] = as_array(tensor.detach().cpu().numpy())
    layout = ParameterLayout.from_arrays(record)
    dtype = torch.float64 if layout.dtype == np.float64 else torch.float32
    for spec in layout.tensors:
        tensor = state[spec.name]
        first = seen.setdefault(id(tensor), spec.name)
        if first != spec.name:
            raise LayoutError(
                f"parameters {first!r} and {spec.name!r} are one tensor, which "
                "a flat model cannot express; untie them."
            )
        if tensor.dtype != dtype:
            raise LayoutError(f"parameter {spec.name!r} is {tensor.dtype}; make the whole model {dtype}.")
    for spec in layout.buffers:
        if state[spec.name].requires_grad:
            raise LayoutError(
                f"parameter {spec.name!r} ({spec.dtype}) would travel as a statistic and never be trained; "
                "make it a float, and let its name not begin with 'running_'."
            )
    return record, layout


def declare_travelling(module: nn.Module, names: Collection[str]) -> None:
    """Say that of ``module`` only the tensors ``names`` travel; the others are frozen and may be shared.

    Raises `LayoutError` for a name that is not in the state dict.
    """
    unknown = sorted(set(names) - set(module.state_dict(keep_vars=True)))
    if unknown:
        raise LayoutError(f"{unknown[0]!r} cannot travel: the model has no such tensor.")
    setattr(module, _NAMES, frozenset(names))


def shares_frozen(module: nn.Module) -> bool:
    """Return whether ``module`` declared what travels, so that its other tensors are frozen."""
    return getattr(module, _NAMES, None) is not None


def copy_sharing_frozen(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` with tensors of its own where they travel, and the same ones elsewhere."""
    memo: dict[int, Any] = {id(tensor): tensor for _, _, tensor in _frozen(module)}
    made: nn.Module = copy.deepcopy(module, memo)
    return made


def place(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Move ``module`` to ``device``; frozen tensors are copied there once, whoever asks.

    The tensors that ``module`` shared before stay where they are.
    """
    device = torch.device(device)
    if shares_frozen(module):
        for owner, name, tensor in list(_frozen(module)):
            if tensor.device != device:
                setattr(owner, name, _copy_on(tensor, device))
    return module.to(device)


def _copy_on(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the one copy of ``tensor`` on ``device``."""
    with building:
        copies: dict[torch.device, Tensor] = _placed.setdefault(tensor, {})
        if device not in copies:
            moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[device] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        return copies[device]


def _frozen(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield (owner, attribute, tensor) of every parameter and buffer that does not travel."""
    kept = {id(tensor) for tensor in travelling(module).values()}
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and id(tensor) not in kept:
                yield owner, name, tensor
