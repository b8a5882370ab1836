"""The ledger of a fleet's run holds, and every way of spoiling it is noticed."""

from __future__ import annotations

import importlib.util
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from turnout.server import RunDescription, RunRecorder, RunStore
from turnout.server.database import STORE_FILE
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.server.ledger import check_ledger
from turnout.server.ledger_replay import Replay
from turnout.simulation import LocalGrid
from turnout.strategies import Scaffold
from turnout.wire import as_array

# Arrays of 80 kB travel as chunks both ways, unlike those that fit into one message.
CLIENTS, ROUNDS, SIZE = 4, 5, 20_000


def zeros() -> ArrayRecord:
    return ArrayRecord({"w": as_array(np.zeros(SIZE, np.float32))})


def again() -> Replay:
    spec = importlib.util.spec_from_file_location("scaffold_node", Path(__file__).parent / "scaffold_node.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Replay(
        strategy=Scaffold(num_clients=CLIENTS), grid=LocalGrid(module.app(0.0), CLIENTS), arrays=zeros()
    )


@pytest.fixture(scope="module")
def recorded(spawn_for_module: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished run of two node processes."""
    parent = tmp_path_factory.mktemp("runs")
    about = RunDescription(
        name="ledger", strategy="scaffold", task="none", seed=0, num_rounds=ROUNDS, num_clients=CLIENTS,
        config={},
    )  # fmt: skip
    with RunStore(parent) as store, FleetServer(num_clients=CLIENTS) as server:
        for name, clients in (("a", "0-1"), ("b", "2-3")):
            folder = tmp_path_factory.mktemp("state")
            spawn_for_module("scaffold_node.py", server.address, clients, name, folder, 0.01)
        grid = FleetGrid(server, min_clients=CLIENTS, wait=30)
        with RunRecorder.create(store, parent, about) as recorder:
            Scaffold(num_clients=CLIENTS).start(
                grid, zeros(), num_rounds=ROUNDS, timeout=30, callbacks=[recorder, CommitCallback(grid)]
            )
    return parent


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "runs")
    return tmp_path / "runs"


def told() -> list[tuple[int, int]]:
    return [(client, number) for client in range(CLIENTS) for number in range(1, ROUNDS + 1)]


def test_the_ledger_of_a_fleet_holds(recorded: Path) -> None:
    with RunStore(recorded, create=False) as store:
        run = store.run("last")
        assert check_ledger(store, run.id, replay=again(), acknowledged=told()) == []
        rounds, rows, members = store.rounds(run.id), store.client_rounds(run.id), store.clients(run.id)
    model = 4 * SIZE
    for row in rounds:  # Two records each way; sent once per stream, for the two clients on it.
        assert 2 * 2 * model <= (row.sent_bytes or 0) < 1.1 * 2 * 2 * model
        assert CLIENTS * 2 * model <= (row.received_bytes or 0) < 1.1 * CLIENTS * 2 * model
    assert {row.attempt for row in rows} == {1}
    assert len({row.task for row in rows}) == CLIENTS * ROUNDS
    assert {member.client: member.name for member in members} == {0: "a/0", 1: "a/1", 2: "b/2", 3: "b/3"}
    assert all(member.offences == 0 and member.tags == {} for member in members)


SPOILED: list[tuple[str, str, str]] = [
    ("a digest", "UPDATE rounds SET model_sha256 = 'ff' || substr(model_sha256, 3) WHERE round = 3",
     "round 4 began with model"),
    ("a digest and the next", "UPDATE rounds SET model_sha256 = replace(model_sha256, model_sha256, 'no'), "
     "model_before_sha256 = 'no' WHERE round = 3", "round 3 began with model no"),
    ("a lost digest", "UPDATE rounds SET model_before_sha256 = NULL WHERE round = 2",
     "round 2 has no model_before_sha256"),
    ("a lost round", "DELETE FROM rounds WHERE round = 3", "round 3 is missing"),
    ("a lost end", "DELETE FROM rounds WHERE round = 5", "round 5 was never committed"),
    ("a lost reply", "DELETE FROM client_rounds WHERE round = 2 AND client = 1",
     "round 2 counts 4 participants, 3 are listed"),
    ("a reply that was none", "UPDATE client_rounds SET outcome = 'missing' WHERE round = 4 AND client = 0",
     "client 0 was told that its reply to round 4 counts"),
    ("a checksum", "UPDATE client_rounds SET reply_crc32 = reply_crc32 + 1 WHERE round = 2 AND client = 3",
     "round 2: the reply of client 3 has CRC-32"),
    ("no checksum", "UPDATE client_rounds SET reply_crc32 = NULL WHERE round = 2 AND client = 3",
     "round 2, client 3: the folded reply has no reply_crc32"),
    ("a reply of another round", "UPDATE client_rounds SET task = (SELECT task FROM client_rounds "
     "WHERE round = 1 AND client = 2) WHERE round = 2 AND client = 2", "was folded twice: for client 2"),
    ("a client that was somebody else", "UPDATE client_rounds SET client = 7 WHERE round = 5 AND client = 0",
     "round 5: client 7 was folded; in the replay"),
    ("the end's digest", "UPDATE runs SET model_sha256 = 'no'", "the run's final model is no"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "statement", "expected"), SPOILED, ids=[row[0] for row in SPOILED])
def test_a_spoiled_ledger_is_noticed(what: str, statement: str, expected: str, copy: Path) -> None:
    database = sqlite3.connect(copy / STORE_FILE)
    assert database.execute(statement).rowcount >= 1, what
    database.commit()
    database.close()
    with RunStore(copy, create=False) as store:
        problems = check_ledger(store, store.run("last").id, replay=again(), acknowledged=told())
    assert any(expected in problem for problem in problems), problems


def test_what_was_never_folded_cannot_be_acknowledged(recorded: Path) -> None:
    with RunStore(recorded, create=False) as store:
        problems = check_ledger(store, store.run("last").id, acknowledged=[*told(), (1, 6), (9, 2)])
    assert problems == [
        "client 1 was told that its reply to round 6 counts; the ledger has none.",
        "client 9 was told that its reply to round 2 counts; the ledger has none.",
    ]


def test_the_store_itself_refuses_a_second_row(copy: Path) -> None:
    database = sqlite3.connect(copy / STORE_FILE)
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO client_rounds SELECT * FROM client_rounds WHERE round = 1")
    database.close()
