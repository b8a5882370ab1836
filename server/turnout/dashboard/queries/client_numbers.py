"""What a run's invitations say of every client: how often it came, how it counted, how long it was away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turnout.dashboard.queries.activity import FAILED, MISSING, OK, REJECTED, Activity
from turnout.wire import NDArray


@dataclass(frozen=True)
class ClientNumbers:
    """One entry per client, in the order of `Activity.clients`.

    ``last_round`` is 0 for who never took part; ``mean_weight`` is NaN for them. ``max_staleness`` is
    the longest absence so far: between the beginning, the client's replies and now.
    """

    rounds_done: int
    clients: NDArray
    invited: NDArray
    seen: NDArray
    failed: NDArray
    rejected: NDArray
    missing: NDArray
    last_round: NDArray
    staleness: NDArray
    max_staleness: NDArray
    mean_weight: NDArray
    weight_share: NDArray


def client_numbers(activity: Activity, weights: NDArray) -> ClientNumbers:
    """Return the numbers of all clients; ``weights`` are the sums of theirs."""
    count = len(activity.clients)

    def counted(outcome: int) -> NDArray:
        return np.bincount(activity.client[activity.outcome == outcome], minlength=count)

    taken = activity.outcome == OK
    client = activity.client[taken]
    rounds = activity.round[taken].astype(np.int64)  # As wide as what it is compared with: much faster.
    seen = np.bincount(client, minlength=count)
    whole = float(weights.sum())
    last = np.zeros(count, dtype=np.int64)
    np.maximum.at(last, client, rounds)
    with np.errstate(invalid="ignore"):
        mean = np.where(seen > 0, weights / np.maximum(seen, 1), np.nan)
    return ClientNumbers(
        rounds_done=activity.rounds_done,
        clients=activity.clients,
        invited=np.bincount(activity.client, minlength=count),
        seen=seen,
        failed=counted(FAILED),
        rejected=counted(REJECTED),
        missing=counted(MISSING),
        last_round=last,
        staleness=activity.rounds_done - last,
        max_staleness=np.maximum(_longest_absence(client, rounds, count), activity.rounds_done - last),
        mean_weight=mean,
        weight_share=weights / whole if whole > 0 else np.full(count, np.nan),
    )


def _longest_absence(client: NDArray, rounds: NDArray, count: int) -> NDArray:
    longest = np.zeros(count, dtype=np.int64)
    if not len(client):
        return longest
    # Stable, so that the rounds of one client stay in order; for 16 bits it is a radix sort.
    order = np.argsort(client.astype(np.uint16) if count <= 1 << 16 else client, kind="stable")
    client, rounds = client[order], rounds[order]
    before = np.concatenate(([0], rounds[:-1]))
    before[np.flatnonzero(np.diff(client, prepend=-1))] = 0
    np.maximum.at(longest, client, rounds - before)
    return longest
