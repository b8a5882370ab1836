"""Who needs attention: clients that are away, that fail, that are late, that weigh or move too much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from turnout.dashboard.models.clients import Attention, AttentionItem
from turnout.dashboard.queries.fleet import Fleet, Fleets
from turnout.dashboard.reader import StoreReader

_SILENT_ROUNDS: Final = 20
_SILENT_GAPS: Final = 7.0  # Who comes at random stays away for so long once in a thousand times.
_FEW_INVITATIONS: Final = 4
_FAILING_SHARE: Final = 0.2
_MISSING_SHARE: Final = 0.5
_WEIGHT_RATIO: Final = 3.0
_NORM_RATIO: Final = 5.0
_SLOW_RATIO: Final = 3.0
_SLOW_SECONDS: Final = 1.0


def attention(reader: StoreReader, fleets: Fleets, run: str, limit: int) -> Attention:
    """Return the ``limit`` most serious reasons. Raises `UnknownRun`."""
    with reader.connect() as connection:
        fleet = fleets.of(connection, run)
    found = [*_away(fleet), *_failing(fleet), *_heavy(fleet), *_outlying(fleet), *_offending(fleet)]
    found.sort(key=lambda item: (-(item.severity or 0.0), int(item.client)))
    return Attention(items=found[:limit], total=len(found), rounds_done=fleet.numbers.rounds_done)


def _item(client: int, kind: Any, excess: float, message: str) -> AttentionItem:
    """Make an item; ``excess`` is how many times the limit was exceeded, from 1 up."""
    severity = 1 - 1 / (1 + max(excess, 0.0))
    return AttentionItem(
        client=str(client), kind=kind, severity=severity, message=f"client {client}: {message}"
    )


def _away(fleet: Fleet) -> Iterator[AttentionItem]:
    numbers = fleet.numbers
    if numbers.rounds_done < _SILENT_ROUNDS:
        return
    for place, client in enumerate(numbers.clients.tolist()):
        seen, staleness = int(numbers.seen[place]), int(numbers.staleness[place])
        if not seen:
            yield _item(client, "never-seen", 3.0, f"never took part in {numbers.rounds_done} rounds")
            continue
        gap = int(numbers.last_round[place]) / seen  # While it still came.
        limit = max(_SILENT_ROUNDS, _SILENT_GAPS * gap)
        if staleness > limit:
            text = f"not seen for {staleness} rounds; before, it came every {gap:.1f} rounds"
            yield _item(client, "silent", staleness / limit, text)


def _failing(fleet: Fleet) -> Iterator[AttentionItem]:
    numbers = fleet.numbers
    for place, client in enumerate(numbers.clients.tolist()):
        invited = int(numbers.invited[place])
        if invited < _FEW_INVITATIONS:
            continue
        bad = int(numbers.failed[place] + numbers.rejected[place])
        if bad > _FAILING_SHARE * invited:
            text = f"failed or was refused in {bad} of {invited} rounds it was invited to"
            yield _item(client, "failing", bad / invited / _FAILING_SHARE, text)
        missing = int(numbers.missing[place])
        if missing > _MISSING_SHARE * invited:
            text = f"missing at the deadline in {missing} of {invited} rounds it was invited to"
            yield _item(client, "missing", missing / invited / _MISSING_SHARE, text)


def _heavy(fleet: Fleet) -> Iterator[AttentionItem]:
    ratio = fleet.numbers.weight_share * len(fleet.numbers.clients)
    for place in np.flatnonzero(np.nan_to_num(ratio) > _WEIGHT_RATIO).tolist():
        text = f"has {ratio[place]:.1f} times its fair share of the weight"
        yield _item(
            int(fleet.numbers.clients[place]), "overweight", float(ratio[place]) / _WEIGHT_RATIO, text
        )


def _outlying(fleet: Fleet) -> Iterator[AttentionItem]:
    for kind, column, limit, unit in (
        ("large-update", "update-norm", _NORM_RATIO, "norm of its last update"),
        ("slow", "train-seconds", _SLOW_RATIO, "time of its last training"),
    ):
        values = fleet.column(column)
        if np.isfinite(values).sum() < _FEW_INVITATIONS:
            continue
        middle = float(np.nanmedian(values))
        if middle <= 0:
            continue
        for place in np.flatnonzero(np.nan_to_num(values) > limit * middle).tolist():
            value = float(values[place])
            if kind == "slow" and value < _SLOW_SECONDS:
                continue
            text = f"{unit} is {value:.3g}, {value / middle:.1f} times the median of {middle:.3g}"
            yield _item(int(fleet.numbers.clients[place]), kind, value / middle / limit, text)


def _offending(fleet: Fleet) -> Iterator[AttentionItem]:
    for client, member in fleet.members.items():
        if member.offences:
            yield _item(
                client, "offences", float(member.offences), f"{member.offences} of its replies were refused"
            )
