"""ECO on the server: the model is sent as codes of a byte a weight or less (arXiv 2601.22101).

The mean update is the server's gradient, G = -mean D. What rounding takes from a step goes into the momentum,
which repays it exactly once, so that no full-precision model is needed:

    M~ = beta M + (1 - beta) G;  W~ = W - eta M~;  W = q(W~);  M = M~ + (1/eta)(1 - 1/beta)(W~ - W)

Then z = W - c M, c = eta beta / (1 - beta), moves as FedAvg's model does, z - eta G each round, for any
rounding. The coefficient is derived from that law; the paper's own listing was not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord

from turnout.strategies.array_api import array_namespace
from turnout.strategies.checks import choice, number, whole_number
from turnout.strategies.coordinates import Coordinates
from turnout.strategies.fedavg import FedAvg
from turnout.wire import ConfigError, NDArray, ParameterLayout, TensorSpec, register
from turnout.wire.grid_codes import as_grid_array


@register("eco", "strategy", "2601.22101")
@dataclass(kw_only=True)
class ServerECO(FedAvg):
    """FedAvg with momentum whose model lies on a grid, and is sent as its codes (ECO).

    Matrices are on the grid, under one scale a row that is fitted anew each round; vectors and single numbers
    are not. The first model is sent as it is. ``server_lr`` is eta.

    momentum
        beta, above 0: the momentum is what carries the rounding error.
    bits
        Of a code, from 2 to 8.
    rounding
        ``"sr"`` (stochastic, unbiased) or ``"rtn"`` (to nearest).
    """

    momentum: float = 0.9
    bits: int = 8
    rounding: Literal["sr", "rtn"] = "sr"

    state_names: ClassVar[tuple[str, ...]] = ("m", "scales")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("momentum", self.momentum, "a number in (0, 1)", above=0.0, below=1.0)
        whole_number("bits", self.bits, 2)
        if self.bits > 8:
            raise ConfigError(f"bits={self.bits} is more than a byte; use 2 to 8.")
        choice("rounding", self.rounding, ("sr", "rtn"))

    def setup(self) -> None:
        """Start without momentum; no scale is known before a first step."""
        if type(self.coordinates) is not Coordinates:
            raise ConfigError("eco rounds tensors as they travel, not aggregation='exact-svd'; leave it out.")
        self.m = np.zeros_like(np.asarray(self.x))
        self.scales = np.zeros(0, self.m.dtype)

    def finish(self, server_round: int) -> Any:
        """Return the rounded model after a step of the momentum; nobody came: nothing moves."""
        if not self._total:
            return self.x
        x, eta, beta = np.asarray(self.x), self.server_lr, self.momentum
        m = beta * self.m.astype(np.float64) - (1 - beta) * np.asarray(self.sum.drain(self._total))
        wanted = x - eta * m
        new, scales, rng = wanted.astype(x.dtype), [], self.rng(server_round)
        for piece, rows in self._blocks():
            block = wanted[piece].reshape(rows, -1)
            scale = self._scale(block).astype(x.dtype)
            noise = rng.random(block.shape) if self.rounding == "sr" else 0.5
            codes = np.clip(np.floor(block / scale + noise), -self._most, self._most)
            new[piece] = (codes.astype(x.dtype) * scale).reshape(-1)
            scales.append(scale.reshape(-1))
        self.scales = np.concatenate(scales) if scales else self.scales
        # Of vectors this is no more than their last bit.
        m += (1 - 1 / beta) / eta * (wanted - new)
        self.m = m.astype(x.dtype)
        return array_namespace(self.x).asarray(new)

    def travelling(self, vector: Any) -> ArrayRecord:
        """Return the model as it is sent: matrices as codes, if they lie on the grid of the last step.

        Tensors of 16 bits travel as they are, and so does all of the first model.
        """
        record, start = super().travelling(vector), 0
        if not len(self.scales):
            return record
        for spec in _matrices(self.layout):
            rows = spec.shape[0]
            scale = self.scales[start : start + rows]
            start += rows
            block = vector[_piece(spec)].reshape(rows, -1)
            codes = np.rint(block / scale[:, np.newaxis])
            on_grid = np.array_equal(codes.astype(block.dtype) * scale[:, np.newaxis], block)
            if on_grid and spec.dtype == scale.dtype.name:
                record[spec.name] = as_grid_array(codes.astype(np.int64).reshape(spec.shape), scale)
        return record

    @property
    def _most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def _scale(self, block: NDArray) -> NDArray:
        """Return the step of each row, shape (rows, 1): its largest number has the largest code."""
        largest: NDArray = np.abs(block).max(axis=1, keepdims=True)
        return np.where(largest > 0, largest, 1.0) / self._most

    def _blocks(self) -> list[tuple[slice, int]]:
        """Return where each matrix lies in the vector, and its rows; without a layout all is one row."""
        if self._layout is None:
            return [(slice(0, self.m.size), 1)]
        return [(_piece(spec), spec.shape[0]) for spec in _matrices(self._layout)]


def _matrices(layout: ParameterLayout) -> list[TensorSpec]:
    return [spec for spec in layout.tensors if len(spec.shape) > 1 and spec.size]


def _piece(spec: TensorSpec) -> slice:
    return slice(spec.offset, spec.offset + spec.size)
