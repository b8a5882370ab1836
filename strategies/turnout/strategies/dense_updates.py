"""Low-rank adapters averaged as dense updates: what the strategies see of them, and what clients hold.

The mean of factors is not the factor of the mean: ``mean(B) mean(A) != mean(B A)``. Here the strategy
computes with the dense updates, so that any rule that is linear in the clients' vectors is exact; what
clients receive are factors of its best approximation of rank r (the truncated SVD, as in FlexLoRA, arXiv
2402.11505). Memory is that of the dense adapted layers for every vector of the strategy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from turnout.strategies.coordinates import Coordinates
from turnout.wire import CheckpointError, ConfigError, NDArray, ParameterLayout

Factors = tuple[NDArray, ...]
"""Of one layer: A (r, d_in), B (d_out, r) and whatever else the method has."""

# Singular values below this share of the largest are rounding.
RANK: Final = 1e-6


@dataclass(frozen=True, slots=True)
class _Block:
    """One adapted layer, or (one part, no ``shapes``) a tensor that is as it is.

    ``parts`` are the slices of its tensors in the messages' vector, ``inner`` its slice in the strategy's.
    """

    parts: tuple[slice, ...]
    inner: slice
    shapes: tuple[tuple[int, ...], ...] = ()

    def of(self, vector: NDArray) -> Factors:
        """Return the layer's factors as views of ``vector``."""
        return tuple(vector[p].reshape(s) for p, s in zip(self.parts, self.shapes, strict=True))


class DenseUpdates(Coordinates):
    """Dense updates ``scale * product(factors)`` inside, factors outside; other tensors as they are.

    ``names`` are the last parts of the factors' names, A's and B's first.
    """

    def __init__(self, names: Sequence[str], scale: float) -> None:
        self._names = tuple(names)
        self._scale = scale
        self._blocks: list[_Block] = []
        self._frame = np.empty(0)
        # The strategy's model and its factors: found once, and the same to the bit ever after.
        self._model = self._factors = np.empty(0)

    @abstractmethod
    def product(self, factors: Factors) -> NDArray:
        """Return the update of ``factors``, shape (d_out, d_in), without the scale."""

    @abstractmethod
    def factorised(self, dense: NDArray, before: Factors) -> Factors:
        """Return factors, near ``before``, of the best approximation of ``dense`` of their rank."""

    @abstractmethod
    def motion(self, factors: Factors, gradient: Factors) -> NDArray:
        """Return the direction in which ``gradient`` moves the product of ``factors``."""

    @abstractmethod
    def gradient(self, factors: Factors, dense: NDArray) -> Factors:
        """Return the smallest gradient whose `motion` is as near to ``dense`` as can be."""

    def bind(self, layout: ParameterLayout, vector: NDArray) -> None:
        """Find the layers. Raises `ConfigError` when the model has none."""
        self._blocks = list(_blocks(layout, self._names))
        self._frame = np.array(vector)
        self._size = self._blocks[-1].inner.stop if self._blocks else 0
        if not any(block.shapes for block in self._blocks):
            raise ConfigError(
                f"aggregation='exact-svd' needs factors {' and '.join(map(repr, self._names))}, "
                "which this model does not have; use the method's own aggregation."
            )
        self._keep(self._frame)

    def sent(self, vector: NDArray) -> None:
        """Take the factors that were sent as those that the next ones stay near."""
        self._frame = np.array(vector)

    def inside(self, vector: NDArray) -> NDArray:
        """Return the dense updates of the factors."""
        return self._inward(vector, lambda block: self.product(block.of(vector)))

    def outside(self, vector: NDArray) -> NDArray:
        """Return factors of the best approximation of rank r, near the last ones that were sent."""
        if np.array_equal(vector, self._model):
            return self._factors
        return self._outward(vector, lambda before, dense: self.factorised(dense, before))

    def project(self, vector: NDArray) -> NDArray:
        """Return the best approximation of rank r of every layer."""
        return self._keep(self.outside(vector))

    def adopted(self, vector: NDArray) -> NDArray:
        """Return the dense updates of factors that were changed by hand, and hold those from now on."""
        return self._model if np.array_equal(vector, self._factors) else self._keep(np.array(vector))

    def gradient_inside(self, vector: NDArray) -> NDArray:
        """Return the direction in which a gradient of the factors moves the dense updates."""
        return self._inward(vector, lambda block: self.motion(block.of(self._frame), block.of(vector)))

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

    def _inward(self, vector: NDArray, product: Callable[[_Block], NDArray]) -> NDArray:
        """Return the strategy's vector of a travelling one: ``product`` of layers, the rest as it is."""
        made = np.empty(self._size, vector.dtype)
        for block in self._blocks:
            made[block.inner] = (
                (self._scale * product(block)).reshape(-1) if block.shapes else vector[block.parts[0]]
            )
        return made

    def _outward(self, vector: NDArray, factors: Callable[[Factors, NDArray], Factors]) -> NDArray:
        """Return the travelling vector of the strategy's: ``factors`` by the last ones and what is dense."""
        made = np.empty_like(self._frame)
        for block in self._blocks:
            if not block.shapes:
                made[block.parts[0]] = vector[block.inner]
                continue
            before = _doubles(block.of(self._frame))
            for part, factor in zip(
                block.parts, factors(before, self._dense(block, vector, before)), strict=True
            ):
                made[part] = factor.reshape(-1)
        return made

    def _dense(self, block: _Block, vector: NDArray, factors: Factors) -> NDArray:
        """Return the block's update in ``vector`` without the scale, in float64."""
        shape = factors[1].shape[0], factors[0].shape[1]
        dense: NDArray = vector[block.inner].reshape(shape).astype(np.float64) / self._scale
        return dense

    def _keep(self, factors: NDArray) -> NDArray:
        """Remember the model of ``factors`` and return it."""
        self._factors, self._model = factors, self.inside(factors)
        return self._model


def _blocks(layout: ParameterLayout, names: tuple[str, ...]) -> Iterator[_Block]:
    """Yield the layout's layers, where A is, and plain tensors, in the order of the layout."""
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    start = 0
    for tensor in layout.tensors:
        path, _, last = tensor.name.rpartition(".")
        group = [by_name.get(f"{path}.{name}") for name in names] if last in names else [None]
        found = [spec for spec in group if spec is not None]
        if len(found) < len(group):
            yield _Block((slice(tensor.offset, tensor.offset + tensor.size),), _after(start, tensor.size))
            start += tensor.size
        elif last == names[0]:
            size = found[1].shape[0] * found[0].shape[1]
            parts = tuple(slice(spec.offset, spec.offset + spec.size) for spec in found)
            yield _Block(parts, _after(start, size), tuple(spec.shape for spec in found))
            start += size


def _after(start: int, size: int) -> slice:
    return slice(start, start + size)


def _doubles(factors: Factors) -> Factors:
    return tuple(factor.astype(np.float64) for factor in factors)
