"""Many clients of one round, trained as one tensor program on one device.

`BatchedTrainer` does what `turnout.client.app.Trainer` does for one client after the other: the same local
updates, minibatches, losses and kept state, up to rounding. Clients are rows of one stack of flat parameters.
"""

from __future__ import annotations

from turnout.client.batched.cohort import CohortOutcome, CohortWork
from turnout.client.batched.trainer import BatchedTrainer

__all__ = ["BatchedTrainer", "CohortOutcome", "CohortWork"]
