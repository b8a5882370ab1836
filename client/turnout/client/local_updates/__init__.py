"""Local updates: what a client does with the model it receives. One module each, registered by name.

They are written against `Work`, which is one client (`LocalRound`) or many at once (`CohortRound`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from turnout.client.local_updates import (
    admm,
    anchor,
    bo_rep,
    bo_rep_local_upper,
    dual_admm,
    dyn,
    eggroll,
    field_space,
    miner,
    prox,
    scaffold,
    sgd,
)
from turnout.client.work import Outcome, Work
from turnout.tasks.task import Vector

LocalUpdate = Callable[[Work], Outcome]
"""A client's algorithm: what it does with one request."""

# Local updates whose clients keep a model of their own between rounds, and how to read it.
LOCAL_MODELS: Final[dict[str, Callable[[Work], Vector]]] = {
    "admm": admm.local_model,
    "dual-admm": dual_admm.local_model,
}

# Local updates that find their model themselves when the request brings none.
OWN_START: Final = frozenset({"eggroll"})

# Local updates that call the model themselves, in float32 whatever `TrainOptions.precision` says.
FULL_PRECISION: Final = frozenset({"bo-rep", "bo-rep-local-upper", "eggroll"})

__all__ = [
    "FULL_PRECISION",
    "LOCAL_MODELS",
    "OWN_START",
    "LocalUpdate",
    "admm",
    "anchor",
    "bo_rep",
    "bo_rep_local_upper",
    "dual_admm",
    "dyn",
    "eggroll",
    "field_space",
    "miner",
    "prox",
    "scaffold",
    "sgd",
]
