"""Subspaces of a weight matrix (columns, rows, entries, or a basis' span), and which tensors are active.

All choices are functions of a seed and of the number of the choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from turnout.wire.errors import ConfigError

Projector = Literal["block", "columns", "rows", "randk", "galore"]
BlockOrder = Literal["random", "ascending", "descending", "mirror"]
Basis = Literal["svd", "random"]


class Subspace(ABC):
    """A linear subspace of the (m, n) matrices, with orthonormal coordinates."""

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """Return the coordinates of the matrix's projection."""

    @abstractmethod
    def lift(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the (m, n) matrix with these coordinates."""

    @abstractmethod
    def clear(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` without its projection, perhaps in its place."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what describes the subspace, as state of an optimizer."""


@dataclass(frozen=True)
class Coordinates(Subspace):
    """Columns (dimension 1), rows (0) or single entries (None) of the matrix; ``index`` is sorted."""

    dimension: int | None
    index: Tensor

    def project(self, matrix: Tensor) -> Tensor:
        """Return the chosen columns, rows or entries."""
        flat = matrix.reshape(-1) if self.dimension is None else matrix
        return flat.index_select(self.dimension or 0, self.index)

    def lift(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        """Return zeros with the coordinates in their places."""
        return self.put(coordinates, coordinates.new_zeros(tuple(shape)))

    def put(self, coordinates: Tensor, matrix: Tensor) -> Tensor:
        """Write the coordinates into a contiguous ``matrix`` and return it."""
        flat = matrix.view(-1) if self.dimension is None else matrix
        flat.index_copy_(self.dimension or 0, self.index, coordinates)
        return matrix

    def clear(self, matrix: Tensor) -> Tensor:
        """Set the chosen places of a contiguous ``matrix`` to zero."""
        flat = matrix.view(-1) if self.dimension is None else matrix
        flat.index_fill_(self.dimension or 0, self.index, 0.0)
        return matrix

    def tensors(self) -> dict[str, Tensor]:
        """Return the index."""
        return {"index": self.index}


@dataclass(frozen=True)
class Span(Subspace):
    """Matrices with rows in the span of ``basis`` (k, n); if ``left``, columns in that of (m, k)."""

    basis: Tensor
    left: bool

    def project(self, matrix: Tensor) -> Tensor:
        """Return ``basis^T G`` or ``G basis^T``."""
        return self.basis.mT @ matrix if self.left else matrix @ self.basis.mT

    def lift(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``basis x`` or ``x basis``."""
        return self.basis @ coordinates if self.left else coordinates @ self.basis

    def clear(self, matrix: Tensor) -> Tensor:
        """Return the matrix minus its projection."""
        return matrix - self.lift(self.project(matrix), matrix.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the basis."""
        return {"basis": self.basis}


def choose(
    projector: Projector, matrix: Tensor, density: float, basis: Basis, words: Sequence[int]
) -> Subspace:
    """Return the subspace that ``words`` (seed, number of the choice, of the tensor) pick.

    ``matrix`` is the gradient: its shape counts, and for ``basis="svd"`` its values.
    """
    rng = np.random.default_rng(list(words))
    m, n = matrix.shape
    if projector != "galore":
        total = {"columns": n, "rows": m}.get(projector, m * n)
        index = np.sort(rng.permutation(total)[: int(density * total)])
        dimension = {"columns": 1, "rows": 0}.get(projector)
        return Coordinates(dimension, torch.from_numpy(index).to(matrix.device))
    left = m < n
    k = round(density * min(m, n))
    if basis == "random":
        drawn = torch.from_numpy(rng.standard_normal((min(m, n), k))).to(matrix.device, matrix.dtype)
        columns = torch.linalg.qr(drawn).Q
    else:
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        columns = U[:, :k] if left else Vh[:k].mT
    columns = columns.contiguous()
    return Span(columns if left else columns.mT.contiguous(), left)


def restored(projector: Projector, state: dict[str, Tensor], shape: Sequence[int]) -> Subspace:
    """Return the subspace that an optimizer's state describes, for matrices of ``shape``."""
    if projector == "galore":
        return Span(state["basis"], shape[0] < shape[1])
    return Coordinates({"columns": 1, "rows": 0}.get(projector), state["index"])


def active_tensors(count: int, density: float, order: BlockOrder, seed: int, window: int) -> frozenset[int]:
    """Return which of ``count`` tensors are active in a window: ``round(density * count)`` of them.

    A pass through all of them takes as many windows as it needs; the last one of a pass reaches back for its
    full number. ``"random"`` shuffles anew for each pass, ``"mirror"`` takes pairs from both ends.
    """
    active = round(density * count)
    if not active:
        return frozenset()
    windows = -(-count // active)
    turn, place = divmod(window, windows)
    if order == "mirror":
        if active % 2:
            raise ConfigError(
                f"block_order='mirror' takes pairs, but density={density} of {count} tensors makes {active}; "
                "choose a density that makes an even number."
            )
        line = [i for j in range(-(-count // 2)) for i in dict.fromkeys((j, count - 1 - j))]
    elif order == "random":
        line = np.random.default_rng([seed, turn]).permutation(count).tolist()
    else:
        line = list(range(count)) if order == "ascending" else list(range(count - 1, -1, -1))
    start = min(place * active, count - active)
    return frozenset(line[start : start + active])
