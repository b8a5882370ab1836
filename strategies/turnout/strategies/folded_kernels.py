"""SNELLA's sparse updates (arXiv 2510.24037) averaged exactly: folded into the weight after every round.

A sparse update is what a kernel of two thin matrices leaves above a threshold: nothing linear, and no thin
matrices give the mean of two of them. So the mean is added to a dense tensor ``folded`` beside them, and the
matrices start again from where they were first: clients adapt ``W + folded`` anew in every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from turnout.strategies.coordinates import Coordinates
from turnout.wire import CheckpointError, ConfigError, NDArray, ParameterLayout

FOLDED: Final = "folded"
_THIN: Final = ("In_Qs", "Out_Qs")
_COMPETITION: Final = ("alpha", "gamma", "beta")
_SMALLEST_GAMMA: Final = 1e-3  # As in the layer.


@dataclass(frozen=True, slots=True)
class _Layer:
    """Slices of ``folded`` (d_out, d_in) and of the kernel's tensors in a vector, and the latter's shapes."""

    path: str
    folded: slice
    shape: tuple[int, ...]
    parts: tuple[slice, ...]
    shapes: tuple[tuple[int, ...], ...]

    def tensors(self, vector: NDArray) -> list[NDArray]:
        """Return the kernel's tensors, in float64."""
        pairs = zip(self.parts, self.shapes, strict=True)
        return [vector[part].reshape(shape).astype(np.float64) for part, shape in pairs]


class FoldedKernels(Coordinates):
    """The weights' whole change in ``folded`` inside; outside, in ``folded`` and a kernel at its first value.

    Inside, the kernel's tensors are always at their first values, so that a sum of updates is one of dense
    changes. Gradients are about the same kernel in every round and stay as they travel. ``scale`` is the
    factor on the kernels.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._layers: list[_Layer] = []
        self._kept: dict[str, int] = {}
        self._first = np.empty(0)
        self._starts: dict[str, tuple[int, NDArray]] = {}
        self._last = (np.empty(0), np.empty(0))

    def bind(self, layout: ParameterLayout, vector: NDArray) -> None:
        """Find the layers. Raises `ConfigError` when the model has none."""
        specs = {tensor.name: tensor for tensor in layout.tensors}
        self._layers = []
        for name, spec in specs.items():
            path, _, last = name.rpartition(".")
            if last != FOLDED:
                continue
            prefix = f"{path}." if path else ""
            own = [specs[prefix + part] for part in (*_THIN, *_COMPETITION) if prefix + part in specs]
            parts = tuple(slice(tensor.offset, tensor.offset + tensor.size) for tensor in own)
            folded = slice(spec.offset, spec.offset + spec.size)
            self._layers.append(
                _Layer(path, folded, spec.shape, parts, tuple(tensor.shape for tensor in own))
            )
        if not self._layers:
            raise ConfigError(
                f"aggregation='exact-fold' needs tensors {FOLDED!r}, which this model does not have; use the "
                "method's own aggregation."
            )
        self._restart(np.array(vector))

    def decided(self, buffers: Mapping[str, NDArray]) -> None:
        """Take the numbers of entries that the kernels keep from now on."""
        for layer in self._layers:
            name = f"{layer.path}.num_kept" if layer.path else "num_kept"
            self._kept[layer.path] = int(buffers[name].reshape(-1)[0])

    def inside(self, vector: NDArray) -> NDArray:
        """Return the change with the kernel's update in it, and the kernel back at its first values."""
        made = np.array(vector)
        for layer in self._layers:
            made[layer.folded] += self._update(layer, layer.tensors(vector))
            for part in layer.parts:
                made[part] = self._first[part]
        return made

    def outside(self, vector: NDArray) -> NDArray:
        """Return the change less what the kernel's first values add to it."""
        made = np.array(vector)
        for layer in self._layers:
            made[layer.folded] -= self._start(layer)
        self._last = vector, made
        return made

    def adopted(self, vector: NDArray) -> NDArray:
        """Return the strategy's vector for a model that an allocator may have changed."""
        inside, outside = self._last
        return inside if np.array_equal(vector, outside) else self.inside(vector)

    def state_dict(self) -> dict[str, Any]:
        """Return the vector with the kernels' first values."""
        return {"first": self._first}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take it over. Raises `CheckpointError` for one of another model."""
        first = tree.get("first")
        if not isinstance(first, np.ndarray) or first.shape != self._first.shape:
            raise CheckpointError("checkpoint holds no kernels of this model; it is of another aggregation.")
        self._restart(np.array(first))

    def _restart(self, first: NDArray) -> None:
        self._first = first
        self._starts.clear()

    def _start(self, layer: _Layer) -> NDArray:
        """Return the update of the kernel's first values, flat; the same until another number is kept."""
        kept = self._kept[layer.path]
        if self._starts.get(layer.path, (None,))[0] != kept:
            self._starts[layer.path] = kept, self._update(layer, layer.tensors(self._first))
        return self._starts[layer.path][1]

    def _update(self, layer: _Layer, tensors: Sequence[NDArray]) -> NDArray:
        update = sparse_square(kernel(self._scale, *tensors), self._kept[layer.path]).T
        return update.reshape(-1).astype(self._first.dtype)


def kernel(scale: float, inner: NDArray, outer: NDArray, *competition: NDArray) -> NDArray:
    """Return K, shape (d_in, d_out), of ``inner`` (H, d_in, q) and ``outer`` (H, d_out, q), in float64.

    ``competition`` is (alpha, gamma, beta), or nothing.
    """
    k = np.zeros((inner.shape[1], outer.shape[1]))
    for h, (a, b) in enumerate(zip(inner, outer, strict=True)):
        # Squares of distances by products: in float64 the cancellation is below the clients' rounding.
        squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
        k += (-1.0) ** h * scale * np.sqrt(np.maximum(squares, 0.0))
    if competition:
        alpha, gamma, beta = (float(value[0]) for value in competition)
        logits = k / (_SMALLEST_GAMMA if abs(gamma) < _SMALLEST_GAMMA else gamma)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        k += alpha * powers / powers.sum(axis=1, keepdims=True) + beta
    return k


def sparse_square(k: NDArray, kept: int) -> NDArray:
    """Return ``K |K|`` at the ``kept`` largest entries of K in size, else 0; of ties at the limit, none."""
    size = np.abs(k)
    if kept < size.size:
        place = size.size - 1 - max(kept, 0)
        size = np.where(size > np.partition(size.reshape(-1), place)[place], size, 0.0)
    return k * size
