"""Weighted least squares over under-determined clients: the recipe of RERCE-Fed (arXiv 2409.13451)."""

from __future__ import annotations

from typing import Final

import numpy as np

from turnout.tasks.least_squares import Design, LeastSquaresTask
from turnout.tasks.task import Vector
from turnout.tasks.validation import check_count
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_NOISE: Final = 0.01
_WEIGHT: Final = 1e4  # 1 / _NOISE ** 2: the best linear unbiased estimator weights by inverse variance


def _standardised(values: Vector) -> Vector:
    """Return ``values`` with zero mean and unit power, exactly."""
    centred = values - values.mean()
    power = np.sqrt(np.mean(centred**2))
    standardised: Vector = centred / power
    return standardised


@register("wls", kind="task", paper="2409.13451", summary="RERCE-Fed's weighted least squares, exact answer")
class Wls(LeastSquaresTask):
    """K clients, each with fewer rows than the L unknowns, so that nobody can solve the problem alone.

    ``w`` is zero-mean with unit power; client k has n_k ~ U{min_examples..max_examples} rows, inputs ``X_k
    = mu_k + sqrt(s_k) * randn`` with mu_k ~ U(-0.5, 0.5) and s_k ~ U(0.5, 1.5), targets ``y = X w + 0.01 *
    noise`` (the client's noise standardised to zero mean and unit power) and W_k = 1e4 I. The defaults are
    the paper's (K=100, L=128). Distances are to the pooled solution, not to ``w``.

    dimension
        L, the number of unknowns.
    min_examples, max_examples
        Between which the number of rows of each client is drawn.
    """

    name = "wls"

    def __init__(
        self,
        *,
        num_clients: int = 100,
        dimension: int = 128,
        min_examples: int = 51,
        max_examples: int = 90,
        seed: int = 0,
    ) -> None:
        check_count("num_clients", num_clients, low=1)
        check_count("dimension", dimension, low=2)
        check_count("min_examples", min_examples, low=2)
        if max_examples < min_examples:
            raise ConfigError(
                f"max_examples={max_examples} is below min_examples={min_examples}; raise it to that or more."
            )
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        w = _standardised(rng.standard_normal(dimension))
        counts = rng.integers(min_examples, max_examples + 1, size=num_clients)
        if counts.sum() < dimension:
            raise ConfigError(
                f"num_clients={num_clients} clients have {counts.sum()} rows for dimension={dimension} "
                "unknowns; use more clients or rows."
            )
        designs = []
        for n in counts:
            mean, variance = rng.uniform(-0.5, 0.5), rng.uniform(0.5, 1.5)
            x = mean + np.sqrt(variance) * rng.standard_normal((n, dimension))
            y = x @ w + _NOISE * _standardised(rng.standard_normal(n))
            designs.append(Design(x, y, np.full(n, _WEIGHT)))
        super().__init__(tuple(designs))
