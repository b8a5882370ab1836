"""The model that every party of an EGGROLL federation computes for itself, and the rule by which it moves.

What is common to all (`Search`) is agreed once; a round then is a list of weights, one per pair, and moves
the `Replica` by ``theta <- optimizer(theta, g)`` with ``g = sum_j w_j E_j``. Sums are exact (`perturbation`)
and the rest is arithmetic of single elements in float64, so that all replicas hold the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np

from turnout.wire import keys
from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError, LayoutError
from turnout.wire.layout import ParameterLayout
from turnout.wire.perturbation import NoiseName, NoiseSource, flat_sum, model_tensors, on_grid

Base = Literal["sgd", "adam"]
MOMENTS: Final = (keys.FIRST_MOMENT, keys.SECOND_MOMENT)
"""Names of the records that hold a base optimizer's moments, in order."""
_EPSILON: Final = 1e-8
_FLOATS: Final = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """How a gradient estimate g of the fitness moves the parameters.

    lr
        Learning rate on the textbook estimate ``g = (1 / 2 P sigma) sum_j d_j E_j``.
    base
        ``"sgd"`` or ``"adam"``.
    momentum
        Of ``"sgd"``: ``m <- momentum m + g``.
    beta1, beta2
        Of ``"adam"``.
    weight_decay
        Decoupled: once a round, ``theta <- (1 - lr weight_decay) theta``.
    """

    lr: float = 1.0
    base: Base = "sgd"
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    @property
    def num_moments(self) -> int:
        """Vectors of the model's size that the rule keeps between rounds."""
        if self.base == "adam":
            return 2
        return 1 if self.momentum else 0

    def step(
        self, theta: NDArray, moments: Sequence[NDArray], g: NDArray, step: int
    ) -> tuple[NDArray, list[NDArray]]:
        """Return the new parameters and moments after step number ``step`` (from 1).

        All are float64 arrays, and are not changed. Only operations that IEEE 754 rounds correctly, one at a
        time: every build of NumPy gives the same bits (torch's square root, for one, does not).
        """
        direction, kept = g, list[NDArray]()
        if self.base == "adam":
            first = moments[0] * self.beta1 + g * (1.0 - self.beta1)
            second = moments[1] * self.beta2 + (g * g) * (1.0 - self.beta2)
            kept = [first, second]
            scale = np.sqrt(second / (1.0 - self.beta2**step)) + _EPSILON
            direction = (first / (1.0 - self.beta1**step)) / scale
        elif self.momentum:
            direction = moments[0] * self.momentum + g
            kept = [direction]
        if self.weight_decay:
            theta = theta * (1.0 - self.lr * self.weight_decay)
        return theta + direction * self.lr, kept


@dataclass(frozen=True, kw_only=True)
class Search(Ascent):
    """All that server and clients agree on: `Ascent`, and where and how far the search looks.

    ``rank`` 0 is full-rank noise for matrices too. Raises `ConfigError` for a model that cannot be searched.
    """

    seed: int
    sigma: float
    rank: int = 1
    noise: NoiseName = "gaussian"
    freeze_1d: bool = False

    def to_config(self) -> dict[str, Any]:
        """Return the entries of a request's config."""
        return {_PREFIX + f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Search:
        """Return what `to_config` wrote. Raises `ConfigError` naming an entry that is missing."""
        values = {}
        for f in fields(cls):
            key = _PREFIX + f.name.replace("_", "-")
            if key not in config:
                raise ConfigError(f"the request's config lacks {key!r}; the strategy must send it.")
            values[f.name] = config[key]
        return cls(**values)

    @cached_property
    def digest(self) -> int:
        """A number of 24 bits that parties with the same settings share."""
        return zlib.crc32(repr(sorted(self.to_config().items())).encode()) >> 8

    def source(self, layout: ParameterLayout) -> NoiseSource:
        """Return the noise for a model of ``layout``."""
        check_searchable(layout)
        rank = self.rank or None
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        tensors = model_tensors(shapes, rank, freeze_1d=self.freeze_1d)
        return NoiseSource(tensors, self.seed, self.rank or 1, self.noise)


_PREFIX: Final = "search-"


def check_searchable(layout: ParameterLayout) -> None:
    """Raise `LayoutError` for a model that replicas cannot hold bit for bit."""
    if layout.buffers:
        names = [spec.name for spec in layout.buffers][:3]
        raise LayoutError(
            f"the model has buffers ({', '.join(names)}), which forward passes do not train and seeds cannot "
            "rebuild; use a model without batch norm (layer or group norm have none)."
        )
    odd = [spec for spec in layout.tensors if spec.dtype not in _FLOATS or spec.dtype != layout.dtype.name]
    if odd:
        raise LayoutError(
            f"tensor {odd[0].name!r} is {odd[0].dtype}; EGGROLL needs all tensors float32, or all float64."
        )


@dataclass(slots=True)
class Replica:
    """A model under search: ``theta``, shape (P,), and the moments of the rule. Arrays are never changed."""

    search: Search
    source: NoiseSource
    theta: NDArray
    moments: list[NDArray]
    steps: int = 0

    @classmethod
    def begin(cls, search: Search, source: NoiseSource, theta: NDArray) -> Replica:
        """Return a replica at the start, its moments zero."""
        return cls(search, source, theta, [np.zeros_like(theta) for _ in range(search.num_moments)])

    def moved(self, server_round: int, weights: NDArray, pairs: NDArray | None = None) -> Replica:
        """Return the replica after a round whose pair ``pairs[j]`` (default: j) had weight ``weights[j]``.

        A round without any pair changes nothing, momentum included.
        """
        if not len(weights):
            return self
        if pairs is None:
            pairs = np.arange(len(weights))
        parts = self.source.combine(server_round, pairs, on_grid(weights, self.source.rank))
        g = flat_sum(parts, self.source.tensors)
        dtype, steps = self.theta.dtype, self.steps + 1
        before = [moment.astype(np.float64) for moment in self.moments]
        with np.errstate(over="ignore", invalid="ignore"):  # The caller looks whether it is finite.
            theta, moments = self.search.step(self.theta.astype(np.float64), before, g, steps)
            kept = [moment.astype(dtype) for moment in moments]
            return Replica(self.search, self.source, theta.astype(dtype), kept, steps)

    @property
    def finite(self) -> bool:
        """Whether every number of it is."""
        return all(bool(np.isfinite(vector).all()) for vector in (self.theta, *self.moments))

    def checksum(self) -> int:
        """Return the CRC-32 of the parameters and moments."""
        value = 0
        for vector in (self.theta, *self.moments):
            value = zlib.crc32(np.ascontiguousarray(vector).view(np.uint8).data, value)
        return value
