"""The layer that every adapter is: a frozen layer with a small trained change of its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from turnout.wire.errors import ConfigError

if TYPE_CHECKING:
    from turnout.peft.config import AdapterConfig


def is_transposed(layer: nn.Module) -> bool:
    """Return whether ``layer`` is the ``Conv1D`` of ``transformers``: linear, its weight (d_in, d_out).

    GPT-2 is made of them; ``fan_in_fan_out`` in Hugging Face ``peft``.
    """
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer, shape (d_out, d_in), a view where it is stored otherwise."""
    weight = cast(Tensor, layer.weight)
    return weight.T if is_transposed(layer) else weight


class AdapterLayer(nn.Module, ABC):
    """Takes the place of ``base_layer`` (frozen; a linear one has weight W, shape (d_out, d_in)).

    A subclass registers its trained tensors as ``nn.Parameter``, float32: these travel. What is fixed and the
    same for all clients it registers as buffers, which do not; those that the server must hand out
    (indices, masks) it names in ``shared_names``. It defines `delta_weight` and, where there is something
    faster than the dense ``W + delta``, `adapted`.

    Buffers in ``travelling_names`` do travel, beside the parameters: integers, or floats whose name begins
    with ``running_``. The server has the mean of what the participants reply, or what its allocator decides.

    ``stackable`` says whether ``torch.func.vmap`` can run the layer for many clients at once.
    """

    shared_names: tuple[str, ...] = ()
    travelling_names: tuple[str, ...] = ()
    stackable: bool = True

    def __init__(self, base_layer: nn.Module, config: AdapterConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self._unmerged: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: W, or W + delta while merged."""
        return weight_of(self.base_layer)

    @property
    def base_weight(self) -> Tensor:
        """W, merged or not: the frozen weight."""
        if self._unmerged is None:
            return self.weight
        return self._unmerged.T if is_transposed(self.base_layer) else self._unmerged

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", self.base_layer.bias)

    @property
    def in_features(self) -> int:
        """d_in, the width of the inputs."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """d_out, the width of the outputs."""
        return int(self.weight.shape[0])

    @property
    def merged(self) -> bool:
        """Whether the change is in the base layer's weight at present."""
        return self._unmerged is not None

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Return the change of the weight, shape (d_out, d_in), float32 and differentiable."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x (W + delta)^T + bias``; x has shape (..., d_in) and the result its dtype."""
        if self.merged:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the output of the layer while it is not merged: here by building the dense weight."""
        return nn.functional.linear(x, self.effective_weight(x.dtype), self.bias)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return ``W + delta``, added in float32 so that 16-bit weights do not swallow small changes."""
        return (self.base_weight.float() + self.delta_weight()).to(dtype)

    def merge(self) -> None:
        """Put the change into the base layer's weight; what other models share of it stays as it is.

        Raises `ConfigError` when the change is in there already.
        """
        if self.merged:
            raise ConfigError("the adapter is merged already; unmerge it first.")
        original = cast(nn.Parameter, self.base_layer.weight)
        with torch.no_grad():
            merged = self.effective_weight(original.dtype)
            if is_transposed(self.base_layer):
                merged = merged.T.contiguous()
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self._unmerged = original

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Raises `ConfigError` when the layer is not merged."""
        if self._unmerged is None:
            raise ConfigError("the adapter is not merged; merge it first.")
        self.base_layer.weight = self._unmerged
        self._unmerged = None

    def shared_state(self) -> dict[str, Tensor]:
        """Return what the server fixes and hands out: the buffers in ``shared_names``."""
        return {name: cast(Tensor, getattr(self, name)) for name in self.shared_names}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Take over what the server handed out; the present tensors may be shared and stay as they are.

        Raises `ConfigError` for missing or unknown names and for shapes or dtypes that differ.
        """
        own = {name: cast(Tensor, getattr(self, name)) for name in self.shared_names}
        check_buffers(own, state)
        for name in self.shared_names:
            setattr(self, name, state[name].detach().clone().to(own[name].device))


def check_buffers(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise `ConfigError` unless ``given`` has the names, shapes and dtypes of ``own``."""
    if set(given) != set(own):
        raise ConfigError(f"shared state has {sorted(given)}, the layer needs {sorted(own)}.")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape or tensor.dtype != given[name].dtype:
            raise ConfigError(
                f"shared state {name!r} is {given[name].dtype} of shape {tuple(given[name].shape)}, the "
                f"layer needs {tensor.dtype} of shape {tuple(tensor.shape)}."
            )
