"""How often each client takes part: FedAU's online estimator, and probabilities known beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from turnout.wire.errors import ConfigError

Participation = Mapping[int, float] | Sequence[float] | float | Literal["estimate"] | None


class ParticipationEstimator:
    """FedAU's estimate of ``1 / p_i`` from the intervals between participations (arXiv 2306.03401, Alg. 2).

    An interval counts the rounds from just after the previous one closed up to and including the next
    participation, at most ``cutoff`` (None: no bound). The weight omega is the mean of the closed intervals,
    1 before the first. Interval lengths add up to the round at which the last one closed, so three integers a
    client say everything and the mean is exact: omega = closed rounds / closed intervals.
    """

    def __init__(self, cutoff: int | None = None) -> None:
        if cutoff is not None and cutoff < 1:
            raise ConfigError(f"cutoff must be at least 1 round or None, got {cutoff}.")
        self.cutoff = cutoff
        self._start: dict[int, int] = {}
        self._closed: dict[int, int] = {}
        self._count: dict[int, int] = {}

    def register(self, client: int, server_round: int) -> None:
        """Count ``client`` as absent from ``server_round`` on until it takes part; known clients are kept."""
        if client not in self._start:
            self._start[client] = self._closed[client] = server_round - 1
            self._count[client] = 0

    def weight(self, client: int, server_round: int) -> float:
        """Return omega of ``client`` as used in ``server_round``: it depends on earlier rounds only."""
        closed, count = self._settled(client, server_round - 1)
        return (closed - self._start[client]) / count if count else 1.0

    def observe(self, server_round: int, participants: Iterable[int]) -> None:
        """Record who took part in ``server_round``; call it after the round's weights were used."""
        for client in participants:
            self.register(client, server_round)
            _, count = self._settled(client, server_round - 1)
            self._closed[client], self._count[client] = server_round, count + 1

    def _settled(self, client: int, last_round: int) -> tuple[int, int]:
        """Return (round of the last close, closed intervals) at the end of ``last_round``.

        Absences that reached the cutoff close an interval of ``cutoff`` rounds each; counting them here, when
        asked, spares a pass over all clients each round.
        """
        closed, count = self._closed[client], self._count[client]
        if self.cutoff is None:
            return closed, count
        reached = max(0, last_round - closed) // self.cutoff
        return closed + reached * self.cutoff, count + reached

    def open_interval(self, client: int, server_round: int) -> int:
        """Return L, the length of the open interval at the end of ``server_round``."""
        return server_round - self._settled(client, server_round)[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as one integer array (clients, 4): client, start, last close, intervals."""
        rows = [[c, self._start[c], self._closed[c], self._count[c]] for c in sorted(self._start)]
        return {"rows": np.array(rows, np.int64).reshape(-1, 4)}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the state with that of `state_dict`."""
        rows = tree["rows"].tolist()
        self._start = {client: start for client, start, _, _ in rows}
        self._closed = {client: closed for client, _, closed, _ in rows}
        self._count = {client: count for client, _, _, count in rows}


def check_probability(field: str, value: float) -> float:
    """Return ``value`` if it is a probability in (0, 1]; raise `ConfigError` naming ``field`` otherwise."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and 0.0 < value <= 1.0):
        raise ConfigError(
            f"{field} must be a probability in (0, 1], got {value!r}; leave out who never comes."
        )
    return float(value)


def known_probability(participation: Mapping[int, float] | Sequence[float] | float, client: int) -> float:
    """Return p of ``client``; raise `ConfigError` when it is not given."""
    if isinstance(participation, (int, float)):
        return float(participation)
    try:
        return float(participation[client])
    except (KeyError, IndexError):
        raise ConfigError(
            f"participation gives no probability for client {client}; add it, or use 'estimate'."
        ) from None


def check_participation(participation: Participation, *, estimate: bool) -> None:
    """Raise `ConfigError` unless ``participation`` is usable (``estimate``: the word is allowed)."""
    if participation is None:
        return
    if isinstance(participation, str):
        if participation != "estimate" or not estimate:
            allowed = "probabilities or 'estimate'" if estimate else "probabilities"
            raise ConfigError(f"participation must be {allowed}, got {participation!r}.")
    elif isinstance(participation, Mapping):
        for client, value in participation.items():
            check_probability(f"participation[{client}]", value)
    elif isinstance(participation, (int, float)):
        check_probability("participation", participation)
    else:
        for client, value in enumerate(participation):
            check_probability(f"participation[{client}]", value)
