"""The kept state of many clients, as stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from turnout.client.work import WorkState
from turnout.tasks.task import Vector


class CohortState:
    """`ClientState` for clients that are alike in what they keep (and, where it matters, since when)."""

    def __init__(self, states: Sequence[WorkState], kept: Sequence[dict[str, Vector]]) -> None:
        self._states = states
        self._kept = kept

    @property
    def last_round(self) -> int | None:
        """The round of the last `save` of the first client."""
        return self._states[0].last_round

    def load(self, size: int) -> dict[str, Vector]:
        """Return the saved vectors by name, shape (C, P); empty before the first `save`."""
        return {name: np.stack([kept[name] for kept in self._kept]) for name in self._kept[0]}

    def save(self, vectors: Mapping[str, Vector]) -> None:
        """Replace the saved vectors, given with shape (C, P) or, alike for all, (P,)."""
        for i, state in enumerate(self._states):
            # Copies, or one client's state would keep the whole stack alive.
            state.save({name: np.array(v if v.ndim == 1 else v[i]) for name, v in vectors.items()})
