"""Low-rank adapters averaged as dense updates, and factorised again by SVD.

The mean of factors is not the factor of the mean: ``mean(B) mean(A) != mean(B A)``. Here the strategy
computes with the dense updates ``s B A``, so that any rule that is linear in the clients' vectors is exact;
what clients receive are factors of its best approximation of rank r (the truncated SVD, as in FlexLoRA, arXiv
2402.11505). Memory is that of the dense adapted layers for every vector of the strategy.

Factors are only unique up to ``(B M, M^-1 A)``, while clients' optimizers, gradients and local models live in
their coordinates. So A stays as near as it can to the previous one, and B follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from turnout.strategies.coordinates import Coordinates
from turnout.wire import CheckpointError, ConfigError, NDArray, ParameterLayout

# Singular values below this share of the largest are rounding.
_RANK: Final = 1e-6
# The smallest singular value of a new A, as a share of the previous A's mean one: keeps B bounded.
_FLOOR: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Block:
    """One adapted layer, or (``rank`` 0) a tensor that is as it is: slices of the vectors on both sides.

    ``a`` (r, d_in) and ``b`` (d_out, r) are the factors' slices; of a plain tensor ``a`` is its slice.
    """

    a: slice
    b: slice
    inner: slice
    rank: int = 0
    d_out: int = 0
    d_in: int = 0


class SvdFactors(Coordinates):
    """Dense updates ``scale B A`` inside, factors outside.

    ``a`` and ``b`` are the last parts of the factors' names, such as "lora_A" and "lora_B". Other tensors are
    the same on both sides.
    """

    def __init__(self, a: str, b: str, scale: float) -> None:
        self._suffixes = (a, b)
        self._scale = scale
        self._blocks: list[_Block] = []
        self._frame = np.empty(0)
        # The strategy's model and its factors: found once, and the same to the bit ever after.
        self._model = self._factors = np.empty(0)

    def bind(self, layout: ParameterLayout, vector: NDArray) -> None:
        """Find the pairs of factors. Raises `ConfigError` when the model has none."""
        self._blocks = list(_blocks(layout, *self._suffixes))
        self._frame = np.array(vector)
        self._size = self._blocks[-1].inner.stop if self._blocks else 0
        if not any(block.rank for block in self._blocks):
            raise ConfigError(
                f"aggregation='exact-svd' needs factors {self._suffixes[0]!r} and {self._suffixes[1]!r}, "
                "which this model does not have; use the method's own aggregation."
            )
        self._keep(self._frame)

    def sent(self, vector: NDArray) -> None:
        """Take the factors that were sent as those that the next ones stay near."""
        self._frame = np.array(vector)

    def inside(self, vector: NDArray) -> NDArray:
        """Return the dense updates of the factors."""
        made = np.empty(self._size, vector.dtype)
        for block in self._blocks:
            if not block.rank:
                made[block.inner] = vector[block.a]
                continue
            a, b = _factors(block, vector)
            made[block.inner] = (self._scale * (b @ a)).reshape(-1)
        return made

    def outside(self, vector: NDArray) -> NDArray:
        """Return factors of the best approximation of rank r, near the last ones that were sent."""
        if np.array_equal(vector, self._model):
            return self._factors
        made = np.empty_like(self._frame)
        for block in self._blocks:
            if not block.rank:
                made[block.a] = vector[block.inner]
                continue
            dense = vector[block.inner].reshape(block.d_out, block.d_in).astype(np.float64) / self._scale
            before, _ = _factors(block, self._frame)
            a, b = _factorised(dense, before.astype(np.float64))
            made[block.a], made[block.b] = a.reshape(-1), b.reshape(-1)
        return made

    def project(self, vector: NDArray) -> NDArray:
        """Return the best approximation of rank r of every layer."""
        return self._keep(self.outside(vector))

    def gradient_inside(self, vector: NDArray) -> NDArray:
        """Return ``scale (G_B A + B G_A)``, the direction in which a factors' gradient moves the update."""
        made = np.empty(self._size, vector.dtype)
        for block in self._blocks:
            if not block.rank:
                made[block.inner] = vector[block.a]
                continue
            (a, b), (ga, gb) = _factors(block, self._frame), _factors(block, vector)
            made[block.inner] = (self._scale * (gb @ a + b @ ga)).reshape(-1)
        return made

    def gradient_outside(self, vector: NDArray) -> NDArray:
        """Return the smallest factors' gradient that moves the update as near to ``vector`` as they can."""
        made = np.empty_like(self._frame)
        for block in self._blocks:
            if not block.rank:
                made[block.a] = vector[block.inner]
                continue
            dense = vector[block.inner].reshape(block.d_out, block.d_in).astype(np.float64) / self._scale
            a, b = _factors(block, self._frame)
            ga, gb = _tangent(dense, a.astype(np.float64), b.astype(np.float64))
            made[block.a], made[block.b] = ga.reshape(-1), gb.reshape(-1)
        return made

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

    def _keep(self, factors: NDArray) -> NDArray:
        """Remember the model of ``factors`` and return it."""
        self._factors, self._model = factors, self.inside(factors)
        return self._model


def _blocks(layout: ParameterLayout, a: str, b: str) -> Iterator[_Block]:
    """Yield the layout's layers and plain tensors, in the order of their first tensors."""
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    start = 0
    for tensor in layout.tensors:
        path, _, last = tensor.name.rpartition(".")
        partner = by_name.get(f"{path}.{b}" if last == a else f"{path}.{a}" if last == b else "")
        outer = slice(tensor.offset, tensor.offset + tensor.size)
        if partner is None:
            yield _Block(outer, outer, slice(start, start + tensor.size))
            start += tensor.size
        elif last == a:
            (rank, d_in), d_out = tensor.shape, partner.shape[0]
            other = slice(partner.offset, partner.offset + partner.size)
            yield _Block(outer, other, slice(start, start + d_out * d_in), rank, d_out, d_in)
            start += d_out * d_in


def _factors(block: _Block, vector: NDArray) -> tuple[NDArray, NDArray]:
    """Return A (r, d_in) and B (d_out, r) as views of ``vector``."""
    a = vector[block.a].reshape(block.rank, block.d_in)
    return a, vector[block.b].reshape(block.d_out, block.rank)


def _factorised(dense: NDArray, before: NDArray) -> tuple[NDArray, NDArray]:
    """Return A, near ``before`` (r, d_in), and B: B A is the best approximation of ``dense`` of rank r."""
    rank = before.shape[0]
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    kept = int((s[:rank] > _RANK * max(float(s[0]), 1e-30)).sum())
    rows = vh[:kept]
    if kept < rank:  # Room is left: for what the previous A has beyond.
        rest = before - before @ rows.T @ rows
        rows = np.concatenate([rows, np.linalg.svd(rest, full_matrices=False)[2][: rank - kept]])
    # The nearest A with these rows' span is the projection; its small singular values are lifted.
    left, sizes, right = np.linalg.svd(before @ rows.T, full_matrices=False)
    floor = _FLOOR * float(np.sqrt(np.square(before).sum() / rank))
    lifted = np.maximum(sizes, floor)
    a = (left * lifted) @ right @ rows
    inverse = rows.T @ right.T / lifted @ left.T  # A's pseudo-inverse, (d_in, r).
    return a, (u[:, :kept] * s[:kept]) @ (vh[:kept] @ inverse)


def _tangent(dense: NDArray, a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """Return the least (G_A, G_B) that minimise ``||G_B A + B G_A - dense||``."""
    ua, sa, va = np.linalg.svd(a, full_matrices=False)  # (r, r), (r,), (r, d_in)
    ub, sb, vb = np.linalg.svd(b, full_matrices=False)  # (d_out, r), (r,), (r, r)
    inverse_a, inverse_b = _inverse(sa), _inverse(sb)
    ub, va = ub * (sb > 0), va * (sa > 0)[:, None]
    right, left = dense @ va.T, ub.T @ dense  # (d_out, r), (r, d_in)
    core = ub.T @ right
    weights = np.square(sa)[None, :] + np.square(sb)[:, None]
    share = np.divide(core, weights, out=np.zeros_like(core), where=weights > 0)
    gb = ((right - ub @ core) * inverse_a + ub @ (share * sa[None, :])) @ ua.T
    ga = vb.T @ (inverse_b[:, None] * (left - core @ va) + (share * sb[:, None]) @ va)
    return ga, gb


def _inverse(s: NDArray) -> NDArray:
    """Return the pseudo-inverse of singular values; those of rounding's size become 0, in place."""
    s[s <= _RANK * max(float(s.max(initial=0.0)), 1e-30)] = 0.0
    return np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)
