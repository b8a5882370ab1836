"""Adapters of factors averaged as dense updates: what the strategies see of them, and what clients hold.

The mean of factors is not the factor of the mean: ``mean(B) mean(A) != mean(B A)``. Here the strategy
computes with the dense updates, so that any rule that is linear in the clients' vectors is exact; what
clients receive are factors of an approximation that the method can hold. Of low-rank factors the best one is
known (the truncated SVD, as in FlexLoRA, arXiv 2402.11505). Memory is that of the dense adapted layers for
every vector of the strategy.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from turnout.strategies.coordinates import Coordinates
from turnout.wire import CheckpointError, ConfigError, NDArray, ParameterLayout

Factors = tuple[NDArray, ...]
"""Of one layer, the tensors that travel, in the order of `FactorLayer.names`."""

# Singular values below this share of the largest are rounding.
RANK: Final = 1e-6


@dataclass(frozen=True, slots=True)
class FactorLayer:
    """An adapted layer: its ``path`` in the model, its factors' full names, its dense ``shape``."""

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    """One adapted ``layer``, or (one part, no layer) a tensor that is as it is.

    ``parts`` are the slices of its tensors in the messages' vector, ``inner`` its slice in the strategy's.
    """

    parts: tuple[slice, ...]
    inner: slice
    shapes: tuple[tuple[int, ...], ...] = ()
    layer: FactorLayer | None = None

    def of(self, vector: NDArray) -> Factors:
        """Return the layer's factors as views of ``vector``."""
        return tuple(vector[p].reshape(s) for p, s in zip(self.parts, self.shapes, strict=True))


class DenseUpdates(Coordinates):
    """Dense updates ``scale * product(factors)`` inside, factors outside; other tensors as they are.

    ``option`` is the value of ``aggregation`` that asks for it.
    """

    option = "exact-svd"

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._blocks: list[_Block] = []
        self._frame = np.empty(0)
        # The strategy's model and its factors: found once, and the same to the bit ever after.
        self._model = self._factors = np.empty(0)

    @abstractmethod
    def layers(self, layout: ParameterLayout) -> Iterable[FactorLayer]:
        """Return the layers whose factors are in ``layout``."""

    @abstractmethod
    def product(self, factors: Factors, path: str) -> NDArray:
        """Return the update of the layer ``path`` with ``factors``, without the scale."""

    @abstractmethod
    def factorised(self, dense: NDArray, before: Factors, path: str) -> Factors:
        """Return factors, near ``before``, whose update is near ``dense``: the best if they are known."""

    @abstractmethod
    def motion(self, factors: Factors, gradient: Factors, path: str) -> NDArray:
        """Return the direction in which ``gradient`` moves the product of ``factors``."""

    @abstractmethod
    def gradient(self, factors: Factors, dense: NDArray, path: str) -> Factors:
        """Return the smallest gradient whose `motion` is as near to ``dense`` as can be."""

    def bind(self, layout: ParameterLayout, vector: NDArray) -> None:
        """Find the layers. Raises `ConfigError` when the model has none."""
        self._blocks = list(_blocks(layout, self.layers(layout)))
        self._frame = np.array(vector)
        self._size = self._blocks[-1].inner.stop if self._blocks else 0
        if not any(block.layer for block in self._blocks):
            raise ConfigError(
                f"aggregation={self.option!r} needs {self.needs}, which this model does not have; use the "
                "method's own aggregation."
            )
        self._keep(self._frame)

    @property
    @abstractmethod
    def needs(self) -> str:
        """What the model must have, for a message."""

    def sent(self, vector: NDArray) -> None:
        """Take the factors that were sent as those that the next ones stay near."""
        self._frame = np.array(vector)

    def inside(self, vector: NDArray) -> NDArray:
        """Return the dense updates of the factors."""
        return self._inward(vector, lambda block, path: self.product(block.of(vector), path))

    def outside(self, vector: NDArray) -> NDArray:
        """Return factors of the best approximation of rank r, near the last ones that were sent."""
        if np.array_equal(vector, self._model):
            return self._factors
        return self._outward(vector, lambda before, dense, path: self.factorised(dense, before, path))

    def project(self, vector: NDArray) -> NDArray:
        """Return the best approximation of rank r of every layer."""
        return self._keep(self.outside(vector))

    def adopted(self, vector: NDArray) -> NDArray:
        """Return the dense updates of factors that were changed by hand, and hold those from now on."""
        return self._model if np.array_equal(vector, self._factors) else self._keep(np.array(vector))

    def gradient_inside(self, vector: NDArray) -> NDArray:
        """Return the direction in which a gradient of the factors moves the dense updates."""
        return self._inward(
            vector, lambda block, path: self.motion(block.of(self._frame), block.of(vector), path)
        )

    def gradient_outside(self, vector: NDArray) -> NDArray:
        """Return the smallest factors' gradient that moves the update as near to ``vector`` as they can."""
        return self._outward(vector, self.gradient)

    def state_dict(self) -> dict[str, Any]:
        """Return the factors that were sent last, and those of the model."""
        return {"frame": self._frame, "factors": self._factors}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take them over. Raises `CheckpointError` for those of another model."""
        for kept in (tree.get("frame"), tree.get("factors")):
            if not isinstance(kept, np.ndarray) or kept.shape != self._frame.shape:
                raise CheckpointError(
                    "checkpoint holds no factors of this model; it is of another aggregation."
                )
        self._frame = np.array(tree["frame"])
        self._keep(np.array(tree["factors"]))

    def _inward(self, vector: NDArray, product: Callable[[_Block, str], NDArray]) -> NDArray:
        """Return the strategy's vector of a travelling one: ``product`` of layers, the rest as it is."""
        made = np.empty(self._size, vector.dtype)
        for block in self._blocks:
            if block.layer is None:
                made[block.inner] = vector[block.parts[0]]
            else:
                made[block.inner] = (self._scale * product(block, block.layer.path)).reshape(-1)
        return made

    def _outward(self, vector: NDArray, factors: Callable[[Factors, NDArray, str], Factors]) -> NDArray:
        """Return the travelling vector of the strategy's: ``factors`` by the last ones and what is dense."""
        made = np.empty_like(self._frame)
        for block in self._blocks:
            if block.layer is None:
                made[block.parts[0]] = vector[block.inner]
                continue
            before = tuple(factor.astype(np.float64) for factor in block.of(self._frame))
            dense = vector[block.inner].reshape(block.layer.shape).astype(np.float64) / self._scale
            found = factors(before, dense, block.layer.path)
            for part, factor in zip(block.parts, found, strict=True):
                made[part] = factor.reshape(-1)
        return made

    def _keep(self, factors: NDArray) -> NDArray:
        """Remember the model of ``factors`` and return it."""
        self._factors, self._model = factors, self.inside(factors)
        return self._model


def _blocks(layout: ParameterLayout, layers: Iterable[FactorLayer]) -> Iterator[_Block]:
    """Yield layers, where the first of their factors is, and plain tensors, in the layout's order."""
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    owner = {name: layer for layer in layers for name in layer.names}
    start = 0
    for tensor in layout.tensors:
        layer = owner.get(tensor.name)
        if layer is not None and tensor.name != layer.names[0]:
            continue
        found = [tensor] if layer is None else [by_name[name] for name in layer.names]
        size = tensor.size if layer is None else math.prod(layer.shape)
        yield _Block(
            tuple(slice(spec.offset, spec.offset + spec.size) for spec in found),
            slice(start, start + size),
            tuple(spec.shape for spec in found),
            layer,
        )
        start += size
