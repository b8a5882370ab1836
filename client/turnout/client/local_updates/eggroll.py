"""EGGROLL's client (arXiv 2511.16652): forward passes of perturbed models, and a replica of the server's."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import numpy as np
from flwr.app import ArrayRecord

from turnout.client.fitness import differences
from turnout.client.flat_model import FlatModel
from turnout.client.work import Outcome
from turnout.tasks.task import Vector
from turnout.tasks.validation import check_count
from turnout.wire import keys
from turnout.wire.errors import ConfigError, LayoutError
from turnout.wire.registry import register
from turnout.wire.replica import MOMENTS, Replica, Search
from turnout.wire.seed_log import Fitness, LogEntry, read_log

if TYPE_CHECKING:
    from turnout.client.local_round import LocalRound

_THETA: Final = "theta"
# Replayed rounds that a process remembers, for the other clients that it works for.
_KEPT_ROUNDS: Final = 4


@register("eggroll", kind="local-update", paper="2511.16652", summary="Fitness of perturbed models (EGGROLL)")
def eggroll(work: LocalRound) -> Outcome:
    """Bring the replica up to date and reply ``d_j = F_j+ - F_j-`` of the pairs asked for, as "fitness".

    The replica comes from the request's model, or from what the client kept, or from the task's initial
    model, and the rounds in the request's log. A client that cannot follow the log, or does not arrive at the
    server's checksum, says so in its reply.
    """
    search = Search.from_config(work.config)
    first, pairs = _count(work, keys.FIRST_PAIR, 0), _count(work, keys.PAIRS, 1)
    replica = synchronised(work, search)
    if replica is None:
        answer = Fitness(
            work.server_round, work.client, first, np.empty(0, np.float32), search.digest, resync=True
        )
        return Outcome({}, math.nan, records={keys.FITNESS: answer.record()})
    names = (_THETA, *MOMENTS)
    work.state.save(dict(zip(names, (replica.theta, *replica.moments), strict=False)))
    found, loss = differences(work, replica, first, pairs)
    signs = work.config.get(keys.FITNESS_SHAPING) == "sign"
    if signs:  # A draw is given to the plus member: noise is symmetric, so that this has no direction.
        found = np.where(found >= 0.0, np.float32(1.0), np.float32(-1.0))
    answer = Fitness(work.server_round, work.client, first, found, search.digest, signs=signs)
    return Outcome({}, loss, records={keys.FITNESS: answer.record()})


def synchronised(work: LocalRound, search: Search) -> Replica | None:
    """Return the replica as it is at the start of the request's round; None when it cannot be had."""
    model, memory = work.model, _Memory.of(work.model)
    source, moments = search.source(model.layout), MOMENTS[: search.num_moments]
    if keys.ARRAYS in work.content:
        sent = [work.extra(name) for name in moments]
        return Replica(search, source, model.vector(), [_needed(m) for m in sent])
    kept, at = work.state.load(model.size), work.state.last_round
    if at is not None and all(name in kept for name in (_THETA, *moments)):
        replica = Replica(search, source, kept[_THETA], [kept[name] for name in moments])
    else:
        replica, at = memory.start(work, search), 1
        if replica.checksum() != work.config.get(keys.START_CHECKSUM):
            return None
    record = work.content.get(keys.SEED_LOG)
    if not isinstance(record, ArrayRecord):
        raise LayoutError(
            f"the request brings neither a model nor a {keys.SEED_LOG!r}; the strategy must send one."
        )
    return _replayed(memory, replica, at, work.server_round, read_log(record))


def _replayed(memory: _Memory, replica: Replica, at: int, now: int, log: list[LogEntry]) -> Replica | None:
    """Return ``replica``, which is at the start of round ``at``, at the start of round ``now``."""
    for entry in log:
        if entry.server_round < at:  # Known already: an answer that did not count.
            continue
        if entry.server_round > at:
            return None
        replica = memory.moved(replica, entry)
        at += 1
        if entry.checksum is not None and replica.checksum() != entry.checksum:
            return None
    return replica if at == now else None


@dataclass(frozen=True, slots=True)
class _Move:
    """One round as it was replayed."""

    entry: LogEntry
    before: Replica
    after: Replica

    def fits(self, replica: Replica, entry: LogEntry) -> bool:
        """Whether this is the move of ``replica`` in the round of ``entry``."""
        mine, old, new = self.entry, self.before, replica
        return (
            mine.server_round == entry.server_round
            and mine.steps == entry.steps
            and old.search == new.search
            and old.source.tensors == new.source.tensors
            and np.array_equal(mine.weights, entry.weights)
            and all(
                a is b or np.array_equal(a, b)
                for a, b in zip((old.theta, *old.moments), (new.theta, *new.moments), strict=True)
            )
        )


class _Memory:
    """The last rounds replayed beside one model: clients of one process then share work and memory."""

    _all: Final[WeakKeyDictionary[FlatModel, _Memory]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._moves: deque[_Move] = deque(maxlen=_KEPT_ROUNDS)
        self._start: Replica | None = None

    @classmethod
    def of(cls, model: FlatModel) -> _Memory:
        """Return the memory that belongs to ``model``, which one thread uses at a time."""
        return cls._all.setdefault(model, cls())

    def start(self, work: LocalRound, search: Search) -> Replica:
        """Return the replica of the task's initial model, one for all clients."""
        if self._start is None or self._start.search != search:
            work.model.load(work.task.initial_arrays())
            source = search.source(work.model.layout)
            self._start = Replica.begin(search, source, work.model.vector())
        return self._start

    def moved(self, replica: Replica, entry: LogEntry) -> Replica:
        """Return ``replica`` after the round of ``entry``."""
        if not len(entry.weights):
            return replica
        for move in self._moves:
            if move.fits(replica, entry):
                return move.after
        before = replace(replica, steps=entry.steps - 1)
        after = before.moved(entry.server_round, entry.weights)
        self._moves.append(_Move(replace(entry, weights=entry.weights.copy()), before, after))
        return after


def _count(work: LocalRound, key: str, low: int) -> int:
    value = work.config.get(key)
    check_count(key, value, low=low)
    assert isinstance(value, int)
    return value


def _needed(moment: Vector | None) -> Vector:
    if moment is None:
        raise ConfigError("the request brings a model without the optimizer's moments; it must send them.")
    return moment
