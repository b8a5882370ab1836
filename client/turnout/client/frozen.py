"""What of a flat vector is not trained (frozen parameters, float buffers): no step may move it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Frozen:
    """The numbers of ``parameters``, shape (P,) or (C, P), in ``pieces``, as they are now.

    Their gradient is zero, but weight decay and averaged weights move what has none.
    """

    def __init__(self, pieces: Sequence[slice], parameters: Tensor) -> None:
        self._held = [(piece, parameters[..., piece].clone()) for piece in pieces]

    def put_back(self, parameters: Tensor) -> None:
        """Write them back into ``parameters``, shape (P,) or the first rows (a, P)."""
        for piece, values in self._held:
            parameters[..., piece] = values[: len(parameters)]
