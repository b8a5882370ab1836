"""Wrong labels planted on purpose: a seeded share of the examples takes another class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turnout.tasks.partition import IntArray
from turnout.tasks.validation import check_number


@dataclass(frozen=True)
class NoisyLabels:
    """``labels`` (n,), wrong ones at ``rows`` (ascending); ``true`` are the labels from before."""

    labels: IntArray
    true: IntArray
    rows: IntArray

    @property
    def wrong(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether each label is wrong, shape (n,)."""
        wrong: np.ndarray[tuple[int], np.dtype[np.bool_]] = self.labels != self.true
        return wrong


def plant_wrong_labels(labels: IntArray, fraction: float, classes: int, seed: int) -> NoisyLabels:
    """Give a ``fraction`` of ``labels`` (n,) one of the other classes, drawn under ``seed``."""
    check_number("fraction", fraction, low=0, high=1)
    rng = np.random.default_rng([seed, 2])
    rows = np.sort(rng.permutation(len(labels))[: round(fraction * len(labels))])
    noisy = labels.copy()
    noisy[rows] = (labels[rows] + rng.integers(1, classes, len(rows))) % classes
    return NoisyLabels(noisy, labels, rows)
