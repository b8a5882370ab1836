"""The participation matrix: exact windows, overviews, runs that grow, runs that are rewound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dashboard_runs import commit, written_run
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.dashboard import StoreReader
from turnout.dashboard.queries.activity import Activity
from turnout.dashboard.queries.fleet import Fleets
from turnout.dashboard.queries.participation import Window, participation
from turnout.server import RunHistory, RunStore
from turnout.server.history import OUTCOMES
from turnout.wire import NDArray

ABSENT, OK, FAILED, REJECTED, MISSING = range(5)
SEVERITY = {ABSENT: 0, OK: 1, MISSING: 2, FAILED: 3, REJECTED: 4}


def asked(api: httpx.Client, run: str, **params: Any) -> tuple[dict[str, Any], NDArray]:
    layout = api.get(f"runs/{run}/participation/layout", params=params).json()
    answer = api.get(f"runs/{run}/participation", params=params)
    assert answer.headers["content-type"] == "application/octet-stream"
    header = json.loads(answer.headers["x-turnout-layout"])
    assert header == {key: value for key, value in layout.items() if key != "clients"}
    shape = (layout["planes"], layout["rows"], layout["columns"])
    return layout, np.frombuffer(answer.content, np.uint8).reshape(shape)


def test_the_whole_matrix_is_that_of_the_store(api: httpx.Client, store: RunStore, run: str) -> None:
    layout, cells = asked(api, run)
    matrix, clients = RunHistory.load(store, store.run(run)).outcome_matrix()
    assert layout["planes"] == 1
    assert layout["clients"] == [str(client) for client in clients]
    assert (cells[0] & 15 == matrix).all()
    roles = {(row.round, row.client): row.role for row in store.client_rounds(run)}
    assert len(set(roles.values())) == 2  # Anchors and miners.
    for (number, client), role in roles.items():
        assert layout["roles"][cells[0][client, number - 1] >> 4] == role
    assert (cells[0][matrix == 0] == 0).all()


def test_windows(api: httpx.Client, run: str) -> None:
    _, whole = asked(api, run)
    layout, part = asked(api, run, rounds="11:20", clients="3:5")
    assert (layout["first_round"], layout["last_round"], layout["first_client"]) == (11, 20, 3)
    assert (part[0] == whole[0][3:6, 10:20]).all()
    assert asked(api, run, rounds="25:")[1].shape == (1, 12, 6)
    assert asked(api, run, rounds=":2")[1].shape == (1, 12, 2)
    for empty in ({"rounds": "31:40"}, {"rounds": "20:10"}, {"clients": "12:"}, {"clients": "5:4"}):
        layout, cells = asked(api, run, **empty)
        assert cells.size == 0
        assert (layout["rows"], layout["columns"], layout["total_rounds"]) == (0, 0, 30)


@pytest.mark.parametrize("sort", ["participation", "last-round", "weight", "staleness", "failures"])
def test_rows_can_be_sorted(api: httpx.Client, run: str, sort: str) -> None:
    plain, whole = asked(api, run)
    layout, cells = asked(api, run, sort=sort, order="desc")
    places = [plain["clients"].index(client) for client in layout["clients"]]
    assert sorted(places) == list(range(12))
    assert (cells[0] == whole[0][places]).all()
    if sort == "participation":
        seen = (cells[0] & 15 == OK).sum(axis=1)
        assert (np.diff(seen) <= 0).all()


def expected_overview(matrix: NDArray, row_step: int, column_step: int) -> tuple[NDArray, NDArray]:
    """Return both planes, cell by cell."""
    rows, columns = -(-matrix.shape[0] // row_step), -(-matrix.shape[1] // column_step)
    share, worst = np.zeros((rows, columns)), np.zeros((rows, columns), int)
    for row in range(rows):
        for column in range(columns):
            block = matrix[
                row * row_step : (row + 1) * row_step, column * column_step : (column + 1) * column_step
            ].ravel()
            share[row, column] = np.ceil(255 * np.count_nonzero(block == OK) / block.size)
            worst[row, column] = max(block.tolist(), key=SEVERITY.__getitem__)
    return share, worst


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    clients=st.integers(1, 12),
    rounds=st.integers(1, 15),
    rows=st.integers(1, 12),
    columns=st.integers(1, 15),
)
def test_an_overview_says_share_and_worst_outcome(
    seed: int, clients: int, rounds: int, rows: int, columns: int
) -> None:
    from turnout.dashboard.queries.participation import _exact, _overview

    matrix = np.random.default_rng(seed).integers(0, 5, (clients, rounds))
    number, client = np.nonzero(matrix.T)
    activity = Activity(
        generation=0, rounds_done=rounds, clients=np.arange(clients, dtype=np.uint64),
        round=(number + 1).astype(np.int32), client=client.astype(np.int32),
        outcome=matrix[client, number].astype(np.uint8), role=np.zeros(len(client), np.uint8),
        roles=(),
    )  # fmt: skip
    places = np.arange(clients, dtype=np.int32)
    exact = np.frombuffer(_exact(activity, places, clients, rounds, 1), np.uint8)
    assert (exact.reshape(clients, rounds) == matrix).all()
    row_step, column_step = -(-clients // rows), -(-rounds // columns)
    share, worst = expected_overview(matrix, row_step, column_step)
    body = _overview(activity, places, clients, rounds, 1, row_step, column_step)
    planes = np.frombuffer(body, np.uint8).reshape(2, *share.shape)
    assert (planes[0] == share).all()
    assert (planes[1] == worst).all()


def test_an_overview_over_http(api: httpx.Client, run: str) -> None:
    _, whole = asked(api, run)
    layout, cells = asked(api, run, rows=5, columns=7)
    assert (layout["row_step"], layout["column_step"], layout["planes"]) == (3, 5, 2)
    assert layout["clients"] == ["0", "3", "6", "9"]
    share, worst = expected_overview(whole[0] & 15, 3, 5)
    assert (cells[0] == share).all()
    assert (cells[1] == worst).all()


def test_a_run_that_grows_and_is_rewound(tmp_path: Path) -> None:
    """What was read before is kept, and forgotten when rounds are computed anew."""
    with RunStore(tmp_path) as store:
        run = written_run(store, "growing", status="running")
        reader = StoreReader(tmp_path)
        fleets = Fleets(reader)

        def cells() -> list[list[int]]:
            matrix = participation(
                reader, fleets.activities, run, Window(), most_rows=100, most_columns=100, order="client",
                descending=False,
            )  # fmt: skip
            shape = matrix.layout.rows, matrix.layout.columns
            return np.frombuffer(matrix.body(), np.uint8).reshape(shape).tolist()

        assert cells() == []
        commit(store, run, 1, {0: "ok", 2: "failed"})
        assert cells() == [[17], [0], [18], [0]]
        commit(store, run, 2, {1: "ok", 2: "ok"}, role="anchor")
        commit(store, run, 3, {3: "missing"})
        assert cells() == [[17, 0, 0], [0, 33, 0], [18, 33, 0], [0, 0, 20]]
        store.reopen(run, after_round=1, num_rounds=100, config={})
        assert cells() == [[17], [0], [18], [0]]
        for number in (2, 3, 4):
            commit(store, run, number, {0: "rejected"})
        assert cells() == [[17, 19, 19, 19], [0, 0, 0, 0], [18, 0, 0, 0], [0, 0, 0, 0]]
        # A client from outside 0..N-1: then the rows are those that were seen.
        commit(store, run, 5, {2**64 - 1: "ok"})
        assert [len(row) for row in cells()] == [5, 5, 5]
        assert cells()[2] == [0, 0, 0, 0, 17]
        reader.close()


def test_a_thousand_rounds_are_read_in_two_halves(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    with RunStore(tmp_path) as store:
        run = written_run(store, "long", num_clients=5)
        matrix = random.integers(0, 5, (5, 1_101))
        for number in range(1, 1_102):
            column = matrix[:, number - 1]
            commit(store, run, number, {c: OUTCOMES[code] for c, code in enumerate(column) if code})
        reader = StoreReader(tmp_path)
        with reader.connect() as connection:
            fleet = Fleets(reader).of(connection, run)
        found = participation(
            reader, Fleets(reader).activities, run, Window(), most_rows=10, most_columns=2_000,
            order="client", descending=False,
        )  # fmt: skip
        reader.close()
    cells = np.frombuffer(found.body(), np.uint8).reshape(found.layout.rows, found.layout.columns)
    assert (cells & 15 == matrix).all()
    assert (fleet.numbers.seen == (matrix == OK).sum(axis=1)).all()
    for client in range(5):
        came = np.flatnonzero(matrix[client] == OK) + 1
        longest = max(np.diff(np.concatenate(([0], came))).max(), 1_101 - came[-1])
        assert fleet.numbers.max_staleness[client] == longest
