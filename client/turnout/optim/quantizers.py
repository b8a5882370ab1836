"""Grids of low-precision weights: fixed, integer codes under an absmax scale, and 8-bit floats."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import torch
from flwr.app import Array
from torch import Tensor

from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError
from turnout.wire.grid_codes import as_grid_array

_NAMES: Final = "'int2' to 'int8', 'fp8', or a number, the step of a fixed grid"
_E4M3_MAX: Final = 448.0
_E4M3_BITS: Final = 3
_MOST_MULTIPLE: Final = 2**24  # Beyond, codes are no shorter than floats.
_E4M3_LEAST: Final = -6  # Exponent of the smallest normal number.


class Quantizer(ABC):
    """A grid for the entries of a tensor, perhaps with a scale: one number a row, or a block of a row."""

    @abstractmethod
    def scale(self, weights: Tensor) -> Tensor | None:
        """Return the scale that fits ``weights``; None for a grid without one."""

    def encode(self, weights: Tensor, scale: Tensor) -> Tensor:
        """Return the codes of ``weights``, which lie on the grid: a byte each."""
        raise ConfigError(f"{self} has no codes; use 'int8' or 'fp8'.")

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the weights of ``codes``, with the bits that were encoded and the dtype of ``scale``."""
        raise ConfigError(f"{self} has no codes; use 'int8' or 'fp8'.")

    def travelling(self, weights: Tensor, scale: Tensor | None) -> Array | None:
        """Return ``weights``, which lie on the grid, as codes and scales; None if there are none."""
        return None

    @abstractmethod
    def steps(self, weights: Tensor, scale: Tensor | None) -> Tensor | float:
        """Return the distance between the grid's points around each entry of ``weights``."""

    @abstractmethod
    def limit(self, scale: Tensor | None) -> Tensor | None:
        """Return the largest point of the grid, None if it has no end."""

    def round(self, weights: Tensor, scale: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """Return ``weights`` on the grid: the nearest point, or ``floor(w / step + noise)`` steps.

        ``noise`` uniform in [0, 1) makes the result unbiased (stochastic rounding).
        """
        steps, limit = self.steps(weights, scale), self.limit(scale)
        codes = weights / steps
        rounded = (codes.round_() if noise is None else codes.add_(noise).floor_()) * steps
        # The largest entry defines the scale, and by rounding may lie a hair beyond the largest code.
        return rounded if limit is None else rounded.clamp_(-limit, limit)


@dataclass(frozen=True)
class FixedGrid(Quantizer):
    """All multiples of ``step``."""

    step: float

    def __post_init__(self) -> None:
        check_number("quantizer", self.step, low=0, open_low=True)

    def scale(self, weights: Tensor) -> None:
        """Return None."""

    def steps(self, weights: Tensor, scale: Tensor | None) -> float:
        """Return the step."""
        return self.step

    def limit(self, scale: Tensor | None) -> None:
        """Return None."""

    def travelling(self, weights: Tensor, scale: Tensor | None) -> Array | None:
        """Return multiples of the step; None where they are too large for codes."""
        codes = (weights.double() / self.step).round_()
        if not float(codes.abs().max()) <= _MOST_MULTIPLE:
            return None
        return _array(codes.long(), torch.tensor([self.step], dtype=weights.dtype))


@dataclass(frozen=True)
class IntegerGrid(Quantizer):
    """Signed codes of ``bits`` bits under one absmax scale per row (per block of ``block`` entries)."""

    bits: int = 8
    block: int | None = None

    def __post_init__(self) -> None:
        check_count("bits", self.bits, low=2)
        if self.block is not None:
            check_count("block", self.block, low=1)

    def scale(self, weights: Tensor) -> Tensor:
        """Return the step of each row or block."""
        return _absmax(weights, self.block).div(2 ** (self.bits - 1) - 1)

    def steps(self, weights: Tensor, scale: Tensor | None) -> Tensor:
        """Return the scale: steps are alike in a row or block."""
        assert scale is not None
        return _spread(scale, self.block)

    def limit(self, scale: Tensor | None) -> Tensor:
        """Return the point of the largest code."""
        assert scale is not None
        return _spread(scale, self.block).mul(2 ** (self.bits - 1) - 1)

    def encode(self, weights: Tensor, scale: Tensor) -> Tensor:
        """Return int8 codes, also of fewer bits."""
        return (weights / _spread(scale, self.block)).round_().to(torch.int8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return ``codes`` times the scale."""
        return codes.to(scale.dtype).mul_(_spread(scale, self.block))

    def travelling(self, weights: Tensor, scale: Tensor | None) -> Array | None:
        """Return codes of ``bits`` bits."""
        return None if scale is None else _array(self.encode(weights, scale).long(), scale)


@dataclass(frozen=True)
class Float8Grid(Quantizer):
    """8-bit floats with three bits of mantissa (e4m3) under one absmax scale per row or block."""

    block: int | None = None

    def scale(self, weights: Tensor) -> Tensor:
        """Return what maps the largest entry of each row or block to the largest float."""
        return _absmax(weights, self.block) / _E4M3_MAX

    def steps(self, weights: Tensor, scale: Tensor | None) -> Tensor:
        """Return the distance of neighbouring floats at each entry's magnitude."""
        assert scale is not None
        wide = _spread(scale, self.block)
        _, exponent = torch.frexp(weights / wide)  # Of a mantissa in [0.5, 1): one more than IEEE's.
        floored = (exponent - 1).clamp_(min=_E4M3_LEAST) - _E4M3_BITS
        return torch.ldexp(wide.expand_as(weights), floored)

    def limit(self, scale: Tensor | None) -> Tensor:
        """Return the largest float."""
        assert scale is not None
        return _spread(scale, self.block) * _E4M3_MAX

    def encode(self, weights: Tensor, scale: Tensor) -> Tensor:
        """Return ``torch.float8_e4m3fn`` numbers."""
        return (weights / _spread(scale, self.block)).to(torch.float8_e4m3fn)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the floats times the scale."""
        return codes.to(scale.dtype).mul_(_spread(scale, self.block))

    def travelling(self, weights: Tensor, scale: Tensor | None) -> Array | None:
        """Return the floats' bytes."""
        return None if scale is None else _array(self.encode(weights, scale).view(torch.uint8), scale)


def _array(codes: Tensor, scale: Tensor) -> Array:
    return as_grid_array(codes.cpu().numpy(), scale.reshape(-1).cpu().numpy())


def _absmax(weights: Tensor, block: int | None) -> Tensor:
    """Return the largest size in each row, (m, 1, ...), or block, (..., n / block); 1 where all are 0."""
    if block is None:
        rows = weights.reshape(len(weights), -1) if weights.dim() else weights.reshape(1, 1)
        most = (
            rows.abs().amax(dim=1).view(-1, *[1] * (weights.dim() - 1)) if weights.dim() else rows.abs()[0, 0]
        )
    else:
        if weights.shape[-1] % block:
            raise ConfigError(
                f"block={block} does not divide rows of {weights.shape[-1]} entries; use a divisor, or None "
                "for one scale per row."
            )
        most = weights.reshape(*weights.shape[:-1], -1, block).abs().amax(dim=-1)
    return torch.where(most > 0, most, torch.ones_like(most))


def _spread(scale: Tensor, block: int | None) -> Tensor:
    """Return the scale shaped to broadcast against the weights."""
    return scale if block is None else scale.repeat_interleave(block, dim=-1)


def quantizer_of(value: object, block: int | None = None) -> Quantizer:
    """Return the quantizer that ``value`` is, or names; `ConfigError` for what is none."""
    if isinstance(value, Quantizer):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return FixedGrid(float(value))
    if isinstance(value, str):
        if value == "fp8":
            return Float8Grid(block)
        named = re.fullmatch(r"int([2-8])", value)
        if named:
            return IntegerGrid(int(named[1]), block)
    raise ConfigError(f"quantizer={value!r} is not known; use {_NAMES}.")
