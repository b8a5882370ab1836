"""The ledger check: whether what the store holds of a run is what was sent and what the strategy made of it.

Every committed round lists the replies that were folded, with the number of their request and their
checksum, and the digests of the model before and after.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from turnout.server.ledger_replay import Replay, check_replay, short
from turnout.server.schema import ClientRoundRow, RoundRow
from turnout.server.store import RunStore
from turnout.wire import CheckpointError, load_checkpoint


def check_ledger(
    store: RunStore,
    run_id: str,
    *,
    replay: Replay | None = None,
    acknowledged: Iterable[tuple[int, int]] = (),
    remote: bool = True,
) -> list[str]:
    """Return what is wrong with a run's ledger, one sentence each; an empty list when it holds.

    Checked are: rounds without a gap, each folded reply once and in its own round, the chain of model
    digests, the newest checkpoint, the final model; with ``replay`` also every model and every reply's
    checksum.
    ``acknowledged`` are (client, round) pairs of which clients were told that their reply was accepted.
    ``remote=False`` is for simulations, whose replies have no request number and no checksum.
    """
    run = store.run(run_id)
    rounds, rows = store.rounds(run.id), store.client_rounds(run.id)
    folded = _folded(rows)
    problems = [*_check_rounds(rounds, folded), *_check_chain(rounds)]
    if remote:
        problems += _check_requests(folded)
    problems += _check_acknowledged(folded, acknowledged)
    if run.status == "finished" and rounds and run.model_sha256 != rounds[-1].model_sha256:
        problems.append(
            f"the run's final model is {short(run.model_sha256)}, "
            f"that of its last round {short(rounds[-1].model_sha256)}."
        )
    problems += _check_checkpoint(store.directory_of(run), rounds)
    if replay is not None:
        problems += check_replay(rounds, rows, replay)
    return problems


_Folded = Mapping[int, list[ClientRoundRow]]


def _folded(rows: Iterable[ClientRoundRow]) -> _Folded:
    """Return the rows of folded replies by round."""
    folded: dict[int, list[ClientRoundRow]] = defaultdict(list)
    for row in rows:
        if row.outcome == "ok":
            folded[row.round].append(row)
    return folded


def _check_rounds(rounds: list[RoundRow], folded: _Folded) -> Iterator[str]:
    known = {row.round for row in rounds}
    for expected in range(1, max(known, default=0) + 1):
        if expected not in known:
            yield f"round {expected} is missing, later ones are there."
    for number in sorted(set(folded) - known):
        yield f"round {number} was never committed, but {len(folded[number])} replies are folded into it."
    for row in rounds:
        replies = folded.get(row.round, [])
        if len(replies) != row.participants:
            yield f"round {row.round} counts {row.participants} participants, {len(replies)} are listed."
        for client, times in Counter(reply.client for reply in replies).items():
            if times > 1:
                yield f"round {row.round}: client {client} was folded {times} times."


def _check_chain(rounds: list[RoundRow]) -> Iterator[str]:
    before: RoundRow | None = None
    for row in rounds:
        for name in ("model_before_sha256", "model_sha256"):
            if getattr(row, name) is None:
                yield f"round {row.round} has no {name}."
        follows = before is not None and before.round == row.round - 1
        if follows and before is not None and row.model_before_sha256 != before.model_sha256:
            yield (
                f"round {row.round} began with model {short(row.model_before_sha256)}, "
                f"round {before.round} ended with {short(before.model_sha256)}."
            )
        before = row


def _check_requests(folded: _Folded) -> Iterator[str]:
    seen: dict[int, ClientRoundRow] = {}
    for _, replies in sorted(folded.items()):
        for row in replies:
            lacking = [name for name in ("task", "attempt", "reply_crc32") if getattr(row, name) is None]
            if lacking:
                named = " and no ".join(lacking)
                yield f"round {row.round}, client {row.client}: the folded reply has no {named}."
            if row.task is None:
                continue
            if row.task in seen:
                first = seen[row.task]
                yield (
                    f"task {row.task} was folded twice: for client {first.client} in round {first.round} "
                    f"and for client {row.client} in round {row.round}."
                )
            seen[row.task] = row


def _check_acknowledged(folded: _Folded, acknowledged: Iterable[tuple[int, int]]) -> Iterator[str]:
    listed = {(row.client, number) for number, replies in folded.items() for row in replies}
    for client, number in sorted(set(acknowledged) - listed):
        yield f"client {client} was told that its reply to round {number} counts; the ledger has none."


def _check_checkpoint(directory: Path, rounds: list[RoundRow]) -> Iterator[str]:
    """The newest checkpoint must be the model that its round's row says."""
    newest = next((row for row in reversed(rounds) if row.checkpoint), None)
    if newest is None or newest.checkpoint is None:
        return
    path = directory / "checkpoints" / newest.checkpoint
    try:
        tree = load_checkpoint(path)
        number, vector = int(tree["round"]), np.ascontiguousarray(tree["strategy"]["x"])
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        yield f"the checkpoint of round {newest.round} cannot be read: {error!r}."
        return
    digest = hashlib.sha256(vector.astype(vector.dtype.newbyteorder("<"), copy=False).data).hexdigest()
    if (number, digest) != (newest.round, newest.model_sha256):
        yield (
            f"{newest.checkpoint} holds model {short(digest)} of round {number}; "
            f"the store says {short(newest.model_sha256)} after round {newest.round}."
        )
