"""From the fitness differences of one EGGROLL round to the weights of its pairs, in any order of arrival."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from turnout.wire import NDArray


@dataclass(slots=True)
class PairScores:
    """The differences of one round: by client row, weight alpha_k, first pair and d_kj, shape (P_k,)."""

    rows: dict[int, tuple[float, int, NDArray]] = field(default_factory=dict)

    def add(self, row: int, alpha: float, first: int, differences: NDArray) -> None:
        """Take the differences of the client in ``row``."""
        self.rows[row] = alpha, first, differences.astype(np.float64)

    @property
    def total(self) -> float:
        """The participants' total weight."""
        return math.fsum(alpha for alpha, _, _ in self.rows.values())

    @property
    def rms(self) -> float:
        """The root of the mean square of all differences; 0 when there is none."""
        squares = [float(d) ** 2 for _, _, row in self.rows.values() for d in row]
        return math.sqrt(math.fsum(squares) / len(squares)) if squares else 0.0

    def largest(self) -> float:
        """Return the largest absolute difference; 0 when there is none."""
        return max((float(np.abs(row).max()) for _, _, row in self.rows.values()), default=0.0)

    def weights(self, num_pairs: int, scale: float) -> NDArray:
        """Return ``w_j = scale * sum_k p_k d_kj`` with ``p_k = alpha_k / sum alpha``, per pair.

        Nobody came: no pair at all. Sums are exactly rounded (`math.fsum`), so that they have no order.
        """
        if not self.rows:
            return np.empty(0)
        terms: list[list[float]] = [[] for _ in range(num_pairs)]
        total = self.total
        for alpha, first, row in self.rows.values():
            for j, value in enumerate((row * (alpha / total * scale)).tolist(), start=first):
                terms[j].append(value)
        return np.array([math.fsum(values) for values in terms])
