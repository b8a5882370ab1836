"""What the batched trainer is given for a group of clients, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord

from turnout.wire.arrays import NDArray


@dataclass(frozen=True, slots=True)
class CohortWork:
    """One instruction to a group of clients in one round.

    Attributes
    ----------
    server_round, local_update, lr, config
        As a single client gets them: ``config`` holds the request's numbers.
    model
        The global model, shape (P,), in the order of `ParameterLayout`; read only.
    vectors
        Further records of the request by name ("bullseye", "control", "initial"), shape (P,) each; read only.
    """

    server_round: int
    local_update: str
    lr: float
    config: ConfigRecord
    model: NDArray
    vectors: Mapping[str, NDArray]


@dataclass(slots=True)
class CohortOutcome:
    """What C clients send back beside their vectors.

    Attributes
    ----------
    losses
        Train loss of each client, shape (C,), float64; NaN for a client that failed.
    extras
        Further records by name ("control"), shape (C, P) each.
    failures
        Why a client could not be trained, by its position among the clients of the call; its row of every
        array means nothing.
    """

    losses: NDArray
    extras: dict[str, NDArray] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)
