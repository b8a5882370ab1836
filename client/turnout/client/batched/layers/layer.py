"""What a layer of the layered engine does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """Where gradients go: ``tensor <- keep * tensor + scale * gradient``, for each of ``tensors`` by name.

    With the parameters as tensors that is a step of SGD, with the gradient buffers it is the gradient.
    """

    tensors: Mapping[str, Tensor]
    scale: float
    keep: float

    def add(self, name: str, gradient: Tensor) -> None:
        """Put a gradient of the tensor's shape into it."""
        tensor = self.tensors[name]
        if self.keep == 0.0:
            tensor.copy_(gradient)
            if self.scale != 1.0:
                tensor.mul_(self.scale)
            return
        if self.keep != 1.0:
            tensor.mul_(self.keep)
        tensor.add_(gradient, alpha=self.scale)


class Layer(ABC):
    """One layer of every model. It keeps from `forward` what its `backward` needs, for one batch."""

    trains: bool = False  # Whether it has parameters.
    outputs: int = 0  # Of a linear layer.
    numbers: int = 0  # What it holds for each example, at most.

    @abstractmethod
    def forward(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the output for ``x`` (a, w, ...), in a buffer that the next layer may change."""

    @abstractmethod
    def backward(self, d: Tensor, parameters: Mapping[str, Tensor], target: Target, *, first: bool) -> Tensor:
        """Put the parameters' gradients into ``target``; return the input's, for ``d`` that of the output.

        ``d`` may be changed. What is returned for the ``first`` layer with parameters is not used.
        """
