"""Grunfeld's investment data: 11 US firms over 20 years, one client per firm, inside statsmodels."""

from __future__ import annotations

import csv
from typing import Any, Final

import numpy as np

from turnout.tasks.least_squares import Design, LeastSquaresTask
from turnout.tasks.partition import Natural
from turnout.tasks.sources import package_file
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_SHA256: Final = "6f6ca138e645eeee6ff3e54fe5b9b498f7ddb5c484237d2a8489c524b3c94098"
_INSTALL: Final = "pip install --no-deps statsmodels==0.15.0"
# Fixed centre and scale of value, capital and of invest, in millions of 1947 dollars: round numbers near
# the pooled moments, so that gradient methods are well conditioned.
_CENTRE: Final = np.array([1000.0, 250.0])
_SCALE: Final = np.array([1300.0, 300.0])
_TARGET_CENTRE: Final = 130.0
_TARGET_SCALE: Final = 200.0


@register("grunfeld", kind="task", summary="Investment of 11 firms, one client each; exact pooled answer")
class Grunfeld(LeastSquaresTask):
    """``invest ~ 1 + value + capital``; each firm's objective is its mean squared error, in fixed units.

    The solution of the federation is pooled ordinary least squares, which `coefficients` gives in the data's
    own units: -38.41005, 0.11453, 0.22751.

    num_clients
        There for uniformity: there are always the 11 firms.
    seed
        There for uniformity: nothing is random.
    """

    name = "grunfeld"

    def __init__(self, *, num_clients: int = 11, seed: int = 0) -> None:
        self.seed = seed
        path = package_file("statsmodels", "datasets/grunfeld/grunfeld.csv", sha256=_SHA256, install=_INSTALL)
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        firms, owners = np.unique([row["firm"] for row in rows], return_inverse=True)
        if num_clients != len(firms):
            raise ConfigError(f"num_clients={num_clients} but there are 11 firms; use 11 or leave it out.")
        self.client_names: tuple[str, ...] = tuple(str(firm) for firm in firms)
        inputs = np.array([[float(row["value"]), float(row["capital"])] for row in rows])
        x = np.column_stack([np.ones(len(rows)), (inputs - _CENTRE) / _SCALE])
        y = (np.array([float(row["invest"]) for row in rows]) - _TARGET_CENTRE) / _TARGET_SCALE
        partition = Natural().split(np.zeros(len(rows), np.int64), len(firms), seed=seed, groups=owners)
        super().__init__(
            tuple(Design(x[own], y[own], np.full(len(own), 1.0 / len(own))) for own in partition.indices)
        )

    def coefficients(self, w: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return (intercept, value, capital) in the data's units for a model vector ``w`` of shape (3,)."""
        slopes = _TARGET_SCALE * w[1:] / _SCALE
        return np.array([_TARGET_CENTRE + _TARGET_SCALE * w[0] - slopes @ _CENTRE, *slopes])
