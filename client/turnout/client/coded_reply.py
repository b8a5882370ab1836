"""Replies in the codes of the client's optimizer: of weights that lie on a grid, or moved by whole steps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array
from torch import Tensor

from turnout.client.flat_model import FlatModel, to_vector
from turnout.optim import ModuleOptimizer
from turnout.tasks.task import Vector
from turnout.wire.arrays import view
from turnout.wire.errors import ConfigError
from turnout.wire.step_counts import STEP_COUNTS_STYPE, step_counts_view


class CodedReply:
    """The codes of one local training that began at ``start``, shape (P,)."""

    def __init__(self, start: Vector) -> None:
        self._start = start
        self._end: Vector | None = None
        self._codes: dict[int, Array] = {}

    def settle(
        self, optimizer: ModuleOptimizer, model: FlatModel, places: Iterable[tuple[Tensor, slice]]
    ) -> None:
        """Encode the trained model, and put what its codes say into its place.

        So the client has what it sends, to the bit, and engines in which nothing travels give the same. A
        model that is not finite has no codes: it travels as it is, and is refused like any other.
        """
        self._end = end = to_vector(model.parameters)
        if not np.isfinite(end).all():
            return
        for p, piece in places:
            old = self._start[piece].reshape(p.shape)
            array = optimizer.coded(p, old)
            if array is not None:
                steps = array.stype == STEP_COUNTS_STYPE
                end[piece] = (step_counts_view(array, old) if steps else view(array)).reshape(-1)
                self._codes[piece.start] = array
        model.load_vector(end)

    def checked(self, received: Vector, sent: object) -> dict[int, Array]:
        """Return the codes, by the offsets of their tensors in the vector.

        Raises `ConfigError` unless the training was from ``received`` to ``sent``.
        """
        vector = to_vector(sent) if isinstance(sent, Tensor) else sent
        if (
            self._end is None
            or not np.array_equal(self._start, received)
            or not isinstance(vector, np.ndarray)
            or not np.array_equal(self._end, vector, equal_nan=True)
        ):
            raise ConfigError(
                "reply='coded' is for local updates that train the received model with the client's "
                "optimizer and reply it, which this one does not; use reply='dense' with this strategy."
            )
        return self._codes
