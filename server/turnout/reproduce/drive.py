"""Drives a strategy object with vectors instead of messages: the code of a federation, only faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from turnout.strategies.algorithm import Algorithm
from turnout.strategies.rounds import Instruction, Reply
from turnout.wire import NDArray, keys


@dataclass(frozen=True, slots=True)
class Sent:
    """What clients with the same instruction send: models or gradients, the rows of ``vectors`` (clients, P).

    ``controls`` are the changes of SCAFFOLD's control variates, of the same shape.
    """

    clients: list[int]
    vectors: NDArray
    controls: NDArray | None = None


class Work(Protocol):
    """What the clients of a cohort do in one round, all at once."""

    def __call__(
        self, server_round: int, received: NDArray, cohort: Mapping[int, Instruction]
    ) -> Iterable[Sent]:
        """Return what the clients in ``cohort`` send after receiving the vector ``received``, shape (P,)."""


def drive(
    algorithm: Algorithm,
    start: NDArray,
    *,
    num_clients: int,
    rounds: int,
    present: Callable[[int], Sequence[int]],
    work: Work,
    observe: Callable[[int, NDArray], None],
) -> NDArray:
    """Run ``rounds`` rounds from the model ``start`` and return the last model.

    ``present(server_round)`` are the clients available, in ascending order; ``observe(server_round, model)``
    sees each round's result. Clients are numbered from 0 to ``num_clients - 1``.
    """
    algorithm.prepare(start)
    registered = range(num_clients)
    model = start
    for server_round in range(1, rounds + 1):
        algorithm.begin_round(server_round, registered)
        cohort = algorithm.select(server_round, present(server_round))
        received = algorithm.broadcast()
        if cohort:
            for sent in work(server_round, received, cohort):
                for reply in _replies(sent, received, cohort[sent.clients[0]]):
                    algorithm.accept(server_round, reply)
        model = algorithm.end_round(server_round)
        observe(server_round, model)
    return model


def _replies(sent: Sent, received: NDArray, told: Instruction) -> Iterator[Reply]:
    """Read what was sent as the gate for messages does (`turnout.strategies.intake`)."""
    vectors = sent.vectors - received if told.reply == "update" else sent.vectors
    peaks = np.abs(vectors).max(axis=1).tolist()
    for i, client in enumerate(sent.clients):
        extra = {} if sent.controls is None else {keys.CONTROL: sent.controls[i]}
        yield Reply(client, vectors[i], 1, peaks[i], told.local_update, extra)
