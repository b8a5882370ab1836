"""How often each client takes part: FedAU's online estimator, and probabilities known beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np

from turnout.strategies.checks import number, whole_number
from turnout.wire.columns import Column
from turnout.wire.errors import ConfigError, ReplyRejected

Participation = Mapping[int, float] | Sequence[float] | float | Literal["estimate"] | None

_UNKNOWN: Final = np.iinfo(np.int64).min


class ParticipationEstimator:
    """FedAU's estimate of ``1 / p_i`` from the intervals between participations (arXiv 2306.03401, Alg. 2).

    An interval counts the rounds from just after the previous one closed up to and including the next
    participation, at most ``cutoff`` (None: no bound). The weight omega is the mean of the closed intervals,
    1 before the first. Interval lengths add up to the round at which the last one closed, so three integers a
    client say everything and the mean is exact: omega = closed rounds / closed intervals.
    """

    def __init__(self, cutoff: int | None = None) -> None:
        whole_number("cutoff", cutoff, 1, optional=True)
        self.cutoff = cutoff
        # By client; a start of _UNKNOWN is a client that was never registered.
        self._start = Column(np.int64, _UNKNOWN)
        self._closed = Column(np.int64)
        self._count = Column(np.int64)

    def register(self, clients: int | range, server_round: int) -> None:
        """Count ``clients`` as absent from ``server_round`` on until they take part; known ones are kept.

        A client is a small non-negative integer, such as its row in the register.
        """
        if isinstance(clients, int):
            if clients < len(self._start) and self._start[clients] != _UNKNOWN:
                return
            clients = range(clients, clients + 1)
        for column in (self._start, self._closed, self._count):
            column.reach(clients.stop)
        rows = slice(clients.start, clients.stop)
        new = self._start.values[rows] == _UNKNOWN
        self._start.values[rows][new] = self._closed.values[rows][new] = server_round - 1

    def weight(self, client: int, server_round: int) -> float:
        """Return omega of ``client`` as used in ``server_round``: it depends on earlier rounds only."""
        closed, count = self._settled(client, server_round - 1)
        return float((closed - self._start[client]) / count) if count else 1.0

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
        """Return the state by client: start, round of the last close, closed intervals."""
        columns = {"start": self._start, "closed": self._closed, "count": self._count}
        return {name: column.state_dict() for name, column in columns.items()}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the state with that of `state_dict`."""
        columns = {"start": self._start, "closed": self._closed, "count": self._count}
        for name, column in columns.items():
            column.load_state_dict(tree[name])


def known_probability(participation: Mapping[int, float] | Sequence[float] | float, client: int) -> float:
    """Return p of ``client``; raise `ReplyRejected` when it is not given."""
    if isinstance(participation, (int, float)):
        return float(participation)
    if isinstance(participation, Mapping):
        known = client in participation
    else:
        known = 0 <= client < len(participation)
    if not known:
        raise ReplyRejected(
            "unknown-client",
            f"participation gives no probability for client {client}; add it, or use 'estimate'.",
        )
    return float(participation[client])


def check_participation(
    participation: Participation, *, estimate: bool, num_clients: int | None = None
) -> None:
    """Raise `ConfigError` unless ``participation`` is usable (``estimate``: the word is allowed).

    A list must reach for all of ``num_clients`` when that is given.
    """
    if participation is None:
        return
    if isinstance(participation, str):
        if participation != "estimate" or not estimate:
            allowed = "probabilities or 'estimate'" if estimate else "probabilities"
            raise ConfigError(f"participation must be {allowed}, got {participation!r}.")
    elif isinstance(participation, Mapping):
        for client, value in participation.items():
            whole_number("participation's client id", client, -(2**63))
            _check_probability(f"participation[{client}]", value)
    elif isinstance(participation, (int, float)):
        _check_probability("participation", participation)
    elif isinstance(participation, (Sequence, np.ndarray)):
        _check_all(participation)
        if num_clients is not None and len(participation) < num_clients:
            raise ConfigError(
                f"participation gives {len(participation)} probabilities for num_clients={num_clients}; "
                "add the missing ones."
            )
    else:
        raise ConfigError(f"participation must be probabilities, got {participation!r}.")


def _check_all(probabilities: Sequence[Any]) -> None:
    """Check many probabilities at once, one by one only where something is wrong or odd."""
    values = np.asarray(probabilities)
    if values.ndim == 1 and values.dtype.kind == "f" and bool(((values > 0) & (values <= 1)).all()):
        return
    for i, probability in enumerate(probabilities):
        _check_probability(f"participation[{i}]", probability)


def _check_probability(field: str, value: Any) -> None:
    number(field, value, "a probability in (0, 1] (leave out who never comes)", above=0.0, most=1.0)
