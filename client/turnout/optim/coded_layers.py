"""Linear layers whose weights exist as low-precision codes only, one byte each, for ECO (arXiv 2601.22101).

Numbers in full precision are made of the codes for one product at a time, forward and backward, and dropped.
The optimizer does the same with one tensor at a time. Gradients and momentum are in full precision.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from turnout.optim.base import state_dtype
from turnout.optim.quantizers import Quantizer, quantizer_of
from turnout.wire.errors import ConfigError

_LAYER = "coded_by"


class CodedLinear(nn.Module):
    """A linear map with weights in codes: x (..., in) to (..., out), and a bias in full precision or none.

    ``codes`` (out, in) are int8 or float8, ``scale`` (out, 1), or (out, in / block), is float32. ``handle``
    stands for the weights in an optimizer's groups: it has their shape and gets their gradient, and is one
    number in memory. Only `ECOSGD` and `ECOAdamW` can train it; they write the codes.

    ``linear`` gives the first weights, rounded to the nearest point. ``quantizer`` and ``block`` must be the
    optimizer's; a fixed grid has no end and is refused with `ConfigError`.
    """

    codes: Tensor
    scale: Tensor
    handle: nn.Parameter

    def __init__(
        self, linear: nn.Linear, quantizer: str | Quantizer = "int8", block: int | None = None
    ) -> None:
        super().__init__()
        self.quantizer = quantizer_of(quantizer, block)
        weight = linear.weight.detach()
        scale = self.quantizer.scale(weight)
        if scale is None:
            raise ConfigError(f"quantizer={quantizer!r} has no end, hence no codes; use 'int8' or 'fp8'.")
        rounded = self.quantizer.round(weight.clone(), scale)
        self.register_buffer("codes", self.quantizer.encode(rounded, scale))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self._make_handle()

    def _make_handle(self) -> None:
        handle = nn.Parameter(self.scale.new_zeros(1, 1).expand(self.codes.shape))
        setattr(handle, _LAYER, self)
        # Not registered: it holds nothing that a state dict should have.
        self.__dict__["handle"] = handle

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_handle()

    @property
    def weight(self) -> Tensor:
        """The weights in full precision, made anew at each access."""
        return self.quantizer.decode(self.codes, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``."""
        y: Tensor = _Product.apply(x, self.handle, self.codes, self.scale, self.quantizer)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the handle along, which `nn.Module` does not know of."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.handle.data = fn(self.handle.data[:1, :1]).expand(self.codes.shape)
        self.handle.grad = None
        return self


class _Product(torch.autograd.Function):
    """``x W^T`` of coded weights; what is kept for the way back is the codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, handle: Tensor, codes: Tensor, scale: Tensor, quantizer: Quantizer
    ) -> Tensor:
        ctx.save_for_backward(x, codes, scale)
        ctx.quantizer = quantizer
        return x @ quantizer.decode(codes, scale).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scale = ctx.saved_tensors
        of_x = gradient @ ctx.quantizer.decode(codes, scale) if ctx.needs_input_grad[0] else None
        of_weights = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return of_x, of_weights, None, None, None


def coded_(module: nn.Module, quantizer: str | Quantizer = "int8", block: int | None = None) -> nn.Module:
    """Replace the linear layers inside ``module`` but the last by `CodedLinear`, in place; return it.

    `ECOSGD.for_module` of the result has the method for these layers and the ordinary update for the rest.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in places[:-1]:
        setattr(parent, name, CodedLinear(child, quantizer, block))
    return module


def handles(module: nn.Module) -> list[Tensor]:
    """Return what stands in optimizers for the coded weights of ``module``."""
    return [layer.handle for layer in module.modules() if isinstance(layer, CodedLinear)]


def weights_of(p: Tensor) -> Tensor:
    """Return a parameter's weights in the dtype of its state: those of its codes, if it stands for codes."""
    layer = getattr(p, _LAYER, None)
    return p.to(state_dtype(p)) if layer is None else layer.weight


def store(p: Tensor, rounded: Tensor, scale: Tensor | None, quantizer: Quantizer) -> None:
    """Put weights on the grid into a parameter, or into the codes it stands for."""
    layer = getattr(p, _LAYER, None)
    if layer is None:
        p.copy_(rounded)
        return
    if quantizer != layer.quantizer or scale is None:
        raise ConfigError(
            f"the optimizer's quantizer is {quantizer}, the coded layer's is {layer.quantizer}; use the "
            "same, and the same block."
        )
    layer.codes.copy_(quantizer.encode(rounded, scale))
    layer.scale.copy_(scale)
