"""The seam between a strategy and the adapter whose allocation the server decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from turnout.allocation.narrow import KeptPart, Sides, kept_parts
from turnout.wire.arrays import NDArray


@dataclass(frozen=True, slots=True)
class ModelView:
    """The global model after a round, to be changed in place.

    ``tensors`` are the parameters by name in their shapes, ``buffers`` what travels beside them: the
    participants' means, except for those that the allocator decides, which are as the server sent them.
    """

    tensors: dict[str, NDArray]
    buffers: dict[str, NDArray]

    def ending(self, name: str) -> Iterator[tuple[str, NDArray]]:
        """Yield (prefix, value) of every tensor or buffer called ``name`` in some layer, in model order.

        The prefix is the layer's path with its final dot, empty at the root.
        """
        for place in (self.tensors, self.buffers):
            for path, value in place.items():
                prefix, _, own = path.rpartition(".")
                if own == name:
                    yield (f"{prefix}." if prefix else ""), value


class Allocator(ABC):
    """Decides between rounds what clients may train. Has no state but what is in the model."""

    #: Own names of the buffers that the allocator decides: what clients reply for them is not looked at.
    decided: ClassVar[tuple[str, ...]] = ()
    #: Tensors of which replies may leave out what a decided mask fixes for good.
    narrows: ClassVar[Sides] = {}

    @abstractmethod
    def allocate(self, server_round: int, model: ModelView) -> None:
        """Decide for the round after ``server_round``; 0 is before the first."""

    def decides(self, path: str) -> bool:
        """Return whether the buffer ``path`` is decided here."""
        return path.rpartition(".")[2] in self.decided

    def kept(self, buffers: Mapping[str, NDArray]) -> dict[str, KeptPart]:
        """Return by tensor what is left of it, under the masks in ``buffers``; see `narrows`."""
        return dict(kept_parts({n: b for n, b in buffers.items() if self.decides(n)}, self.narrows))
