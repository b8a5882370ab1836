"""Scratch tensors that are used again, so that a step allocates nothing."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

_MOST_VIEWS: Final = 1 << 14


class Workspace:
    """Tensors by name, whatever shape is asked for; what they hold is left from their last use."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._blocks: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """Return the tensor ``name`` in this shape, contiguous."""
        view = self._views.get((name, shape))
        return self._make(name, shape) if view is None else view

    def _make(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        block = self._blocks.get(name)
        if block is None or len(block) < size:
            block = self._blocks[name] = self._like.new_zeros(size)
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
        if len(self._views) > _MOST_VIEWS:
            self._views.clear()
        view = self._views[name, shape] = block[:size].view(shape)
        return view
