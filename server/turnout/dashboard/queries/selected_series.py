"""The series that a page asks for, thinned out to what it can draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turnout.dashboard.downsampling import downsampled
from turnout.dashboard.models.rounds import Series, SeriesList
from turnout.dashboard.queries import series
from turnout.dashboard.queries.rounds import clock
from turnout.dashboard.queries.runs import find_run, rounds_done, version_of
from turnout.dashboard.queries.series import Points
from turnout.dashboard.reader import StoreReader


def selected_series(
    reader: StoreReader, run: str, names: Sequence[tuple[str, str]], *, points: int
) -> SeriesList:
    """Return series by (kind, name), those unknown as empty ones. Raises `UnknownRun`."""
    with reader.connect() as connection:
        row = find_run(connection, run)
        done = rounds_done(connection, run)
        version = version_of(row, done)
        found = []
        for kind, name in names:
            whole = reader.memo.get(
                ("points", run, kind, name, points), version, lambda k=kind, n=name: _thinned(  # type: ignore[misc]
                    series.points(connection, run, k, n), points
                ),
            )  # fmt: skip
            found.append((kind, name, *whole))
        cost = reader.memo.get(("clock", run), version, lambda: clock(connection, run))
    documents = [
        Series(
            kind=kind,  # type: ignore[arg-type]
            name=name,
            rounds=thin.rounds.tolist(),
            values=thin.values.tolist(),
            total=total,
            exact=len(thin.rounds) == total,
        )
        for kind, name, thin, total in found
    ]
    drawn = [np.empty(0, np.int64), *(thin.rounds for _, _, thin, _ in found)]
    rounds = np.unique(np.concatenate(drawn))
    return SeriesList(
        run=run,
        rounds_done=done,
        series=documents,
        clock_rounds=rounds.tolist(),
        seconds=cost.at(rounds).tolist(),
    )


def _thinned(whole: Points, points: int) -> tuple[Points, int]:
    return downsampled(whole, points), len(whole.rounds)
