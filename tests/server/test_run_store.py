from __future__ import annotations

import io
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from turnout.server import RoundRow, RunRow, RunStore, StoreError, database
from turnout.server.schema import SCHEMA_REVISION, Base

_START = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


def run_row(run_id: str, **changes: Any) -> RunRow:
    number = int(run_id, 16) % 1000
    values: dict[str, Any] = {
        "id": run_id,
        "name": "trial",
        "strategy": "fedavg",
        "task": "digits",
        "status": "running",
        "seed": 1,
        "num_rounds": 5,
        "num_clients": 3,
        "directory": run_id,
        "config": {"run": {"rounds": 5}},
        "created_at": _START + timedelta(seconds=number),
        "heartbeat_at": _START,
        "seconds": 0.0,
    }
    return RunRow(**(values | changes))


def round_row(run_id: str, number: int, **changes: Any) -> RoundRow:
    counts = dict.fromkeys(("invited", "participants", "failed", "rejected", "missing"), 1)
    phases = dict.fromkeys(
        ("select_seconds", "train_seconds", "fold_seconds", "finish_seconds", "evaluate_seconds"), 0.5
    )
    return RoundRow(run_id=run_id, round=number, committed_at=_START, **(counts | phases | changes))


def client(number: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "client": number,
        "outcome": "ok",
        "role": "sgd",
        "reason": None,
        "num_examples": 5,
        "weight": 0.5,
        "staleness": 2,
        "train_loss": 0.1,
        "train_seconds": 0.2,
        "update_norm": 1.5,
    }
    return values | changes


def member(number: int, **changes: Any) -> dict[str, Any]:
    values = {"client": number, "name": f"node/{number}", "device": "cpu", "examples": 7, "offences": 0}
    return {**values, "tags": {"site": "a"}, **changes}


def test_what_is_committed_is_read_back(store: RunStore) -> None:
    store.create_run(run_row("a1"))
    metrics = {"evaluate": {"accuracy": 0.5, "loss": math.nan}, "train": {"loss": math.inf}}
    store.commit_round(round_row("a1", 1), metrics, [client(4), client(2)], seconds=3.5)
    run = store.run("a1")
    assert (run.seconds, run.status, run.config) == (3.5, "running", {"run": {"rounds": 5}})
    assert run.created_at.tzinfo is not None
    assert run.heartbeat_at == _START
    assert [row.client for row in store.client_rounds("a1")] == [2, 4]
    assert store.series("a1", "evaluate", "accuracy") == [(1, 0.5)]
    assert math.isnan(store.series("a1", "evaluate", "loss")[0][1])
    assert store.series("a1", "train", "loss") == [(1, math.inf)]
    assert store.rounds_done(["a1", "b2"]) == {"a1": 1}


def test_client_ids_use_all_64_bits(store: RunStore) -> None:
    ids = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    store.create_run(run_row("a1"))
    store.commit_round(round_row("a1", 1), {}, [client(i) for i in ids], seconds=0)
    assert sorted(row.client for row in store.client_rounds("a1")) == ids


def test_clients_are_kept_as_they_last_described_themselves(store: RunStore) -> None:
    store.create_run(run_row("a1"))
    store.create_run(run_row("b2"))
    store.commit_round(round_row("a1", 1), {}, [], seconds=1, members=[member(2**64 - 1), member(2)])
    store.commit_round(round_row("b2", 1), {}, [], seconds=1, members=[member(2, device="cuda")])
    store.commit_round(round_row("a1", 2), {}, [], seconds=2, members=[member(2, offences=3, tags={})])
    first, second = store.clients("a1")
    assert (first.client, first.name, first.offences, first.tags) == (2, "node/2", 3, {})
    assert (second.client, second.tags, second.examples) == (2**64 - 1, {"site": "a"}, 7)
    assert store.clients("b2")[0].device == "cuda"


def test_a_round_commits_whole_or_not_at_all(store: RunStore) -> None:
    store.create_run(run_row("a1"))
    with pytest.raises(Exception, match=r"UNIQUE|client_rounds"):
        store.commit_round(round_row("a1", 1), {"train": {"loss": 1.0}}, [client(1), client(1)], seconds=9)
    assert store.rounds("a1") == []
    assert store.metrics("a1") == []
    assert store.run("a1").seconds == 0.0


def test_runs_are_found_by_id_by_its_start_and_as_last(store: RunStore) -> None:
    with pytest.raises(StoreError, match="no run yet"):
        store.run("last")
    for run_id in ("ab01", "ab02", "cd03"):
        store.create_run(run_row(run_id, study="s1" if run_id == "ab01" else None))
    assert store.run("cd").id == "cd03"
    assert store.run("ab02").id == "ab02"
    assert store.run("last").id == max(("ab01", "ab02", "cd03"), key=lambda i: int(i, 16) % 1000)
    assert [run.id for run in store.runs(study="s1")] == ["ab01"]
    for wrong, why in (("ab", "ambiguous"), ("ff", "not in the store"), ("", "not in"), ("%", "not in")):
        with pytest.raises(StoreError, match=why):
            store.run(wrong)


def test_reopening_drops_what_came_after_the_checkpoint(store: RunStore) -> None:
    store.create_run(run_row("a1"))
    store.record_initial("a1", {"accuracy": 0.1})
    for number in (1, 2, 3):
        store.commit_round(
            round_row("a1", number, checkpoint=f"round-{number}"),
            {"evaluate": {"accuracy": number / 10}},
            [client(number)],
            seconds=number,
            oldest_checkpoint=number - 1,
        )
    assert [row.checkpoint for row in store.rounds("a1")] == [None, "round-2", "round-3"]
    store.finish("a1", "failed", seconds=3, error="boom")
    assert store.run("a1").error == "boom"
    store.reopen("a1", after_round=2, num_rounds=9, config={"run": {"rounds": 9}})
    assert [row.round for row in store.rounds("a1")] == [1, 2]
    assert [number for number, _ in store.series("a1", "evaluate", "accuracy")] == [0, 1, 2]
    assert [row.round for row in store.client_rounds("a1")] == [1, 2]
    run = store.run("a1")
    assert (run.status, run.num_rounds, run.error) == ("running", 9, None)
    assert store.latest_metrics("a1") == {"accuracy": 0.2}
    kinds = [event.kind for event in store.events("a1")]
    assert kinds == ["created", "failed", "resumed"]
    first = store.events("a1")[0].id
    assert [event.kind for event in store.events("a1", after=first)] == ["failed", "resumed"]


def test_sqlite_keeps_a_committed_round_through_a_power_cut(store: RunStore) -> None:
    with store._engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_run_directories_move_with_their_store(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs") as store:
        inside = store.stored_directory(tmp_path / "runs" / "r1")
        outside = store.stored_directory(tmp_path / "elsewhere" / "r2")
        store.create_run(run_row("a1", directory=inside))
        store.create_run(run_row("b2", directory=outside))
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    with RunStore(tmp_path / "moved") as store:
        assert store.directory_of(store.run("a1")) == tmp_path / "moved" / "r1"
        assert store.directory_of(store.run("b2")) == tmp_path / "elsewhere" / "r2"


# Schema and migrations.


def test_migrations_build_exactly_the_declared_tables(store: RunStore) -> None:
    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert ScriptDirectory(str(database.MIGRATIONS)).get_current_head() == SCHEMA_REVISION


def test_lists_and_series_are_read_through_an_index(store: RunStore) -> None:
    def plan(query: str) -> str:
        with store._engine.connect() as connection:
            return " ".join(str(row[3]) for row in connection.execute(text(f"EXPLAIN QUERY PLAN {query}")))

    assert "ix_runs_created_at" in plan("SELECT id FROM runs ORDER BY created_at DESC LIMIT 5")
    series = plan(
        "SELECT round, value FROM metrics WHERE run_id='a' AND kind='train' AND name='loss' ORDER BY round"
    )
    assert "PRIMARY KEY" in series
    assert "TEMP B-TREE" not in series


def set_revision(path: Path, revision: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.commit()
    connection.close()


def test_a_newer_store_is_refused_and_left_untouched(tmp_path: Path) -> None:
    RunStore(tmp_path).close()
    path = tmp_path / database.STORE_FILE
    set_revision(path, "9999")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"9999.*newer Turnout.*untouched"):
        RunStore(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob("*.backup")] == []


def test_an_older_store_is_copied_aside_and_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore(tmp_path) as store:
        store.create_run(run_row("a1"))
    scripts = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, scripts)
    (scripts / "versions" / "rev_9998_note.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision = '9998'\ndown_revision = {SCHEMA_REVISION!r}\n"
        "branch_labels = None\ndepends_on = None\n\n"
        "def upgrade():\n    op.add_column('runs', sa.Column('note', sa.Text))\n"
    )
    monkeypatch.setattr(database, "MIGRATIONS", scripts)
    monkeypatch.setattr(database, "SCHEMA_REVISION", "9998")
    with RunStore(tmp_path) as store:
        assert store.run("a1").name == "trial"
    (backup,) = tmp_path.glob("*.backup")
    assert backup.name == f"turnout.sqlite.schema-{SCHEMA_REVISION}.backup"
    copied = sqlite3.connect(backup)
    assert copied.execute("SELECT id FROM runs").fetchall() == [("a1",)]
    assert copied.execute("SELECT version_num FROM alembic_version").fetchone() == (SCHEMA_REVISION,)
    copied.close()
    now = sqlite3.connect(tmp_path / database.STORE_FILE)
    assert "note" in [row[1] for row in now.execute("PRAGMA table_info(runs)")]
    now.close()


def test_a_store_of_the_first_schema_keeps_its_runs(tmp_path: Path) -> None:
    path = tmp_path / database.STORE_FILE
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    old = sqlite3.connect(path)
    old.execute(
        "INSERT INTO runs VALUES ('a1', 'trial', 'fedavg', 'digits', 'running', NULL, 1, 5, 3, 'a1', '{}', "
        "'2025-01-02 03:04:05', '2025-01-02 03:04:05', NULL, 0.5, NULL, NULL)"
    )
    old.execute(
        "INSERT INTO rounds VALUES ('a1', 1, 1, 1, 0, 0, 0, .1, .2, .3, .4, .5, 'c', '2025-01-02 03:04:06')"
    )
    old.execute("INSERT INTO client_rounds VALUES ('a1', 1, -1, 'ok', 'sgd', NULL, 5, 1.0, 0, 0.5, 0.1, 2.0)")
    old.commit()
    old.close()
    with RunStore(tmp_path) as store:
        (row,), (reply,) = store.rounds("a1"), store.client_rounds("a1")
        assert (row.checkpoint, row.evaluate_seconds, row.model_sha256, row.sent_bytes) == (
            "c",
            0.5,
            None,
            None,
        )
        assert (reply.client, reply.update_norm, reply.task, reply.metrics) == (2**64 - 1, 2.0, None, None)
        assert store.clients("a1") == []
        store.commit_round(round_row("a1", 2), {}, [client(3)], seconds=1.0, members=[member(3)])
        assert store.clients("a1")[0].name == "node/3"
    assert [file.name for file in tmp_path.glob("*.backup")] == ["turnout.sqlite.schema-0001.backup"]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunStore(tmp_path).close()
    scripts = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, scripts)
    (scripts / "versions" / "rev_9998_broken.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision = '9998'\ndown_revision = {SCHEMA_REVISION!r}\n"
        "branch_labels = None\ndepends_on = None\n\n"
        "def upgrade():\n    op.add_column('runs', sa.Column('note', sa.Text))\n"
        "    raise RuntimeError('no')\n"
    )
    monkeypatch.setattr(database, "MIGRATIONS", scripts)
    monkeypatch.setattr(database, "SCHEMA_REVISION", "9998")
    with pytest.raises(RuntimeError):
        RunStore(tmp_path)
    connection = sqlite3.connect(tmp_path / database.STORE_FILE)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (SCHEMA_REVISION,)
    assert "note" not in [row[1] for row in connection.execute("PRAGMA table_info(runs)")]
    connection.close()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE cats (name TEXT)")
    other.commit()
    other.close()
    with pytest.raises(StoreError, match=r"other tables.*cats"):
        RunStore(tmp_path / "other.sqlite")
    (tmp_path / "text.sqlite").write_text("this is no database, and it is long enough to be sure " * 20)
    with pytest.raises(StoreError, match="not a database"):
        RunStore(tmp_path / "text.sqlite")


def test_places_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no run store at .*--store"):
        RunStore(tmp_path / "missing", create=False)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(StoreError, match="sqlite:///FILE or postgresql"):
        RunStore("nosuchdb://host/name")
    with pytest.raises(StoreError, match="cannot be read"):
        RunStore("postgresql://host:port/name")


def test_processes_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    code = f"from turnout.server.store import RunStore; print(len(RunStore({str(tmp_path / 'r')!r}).runs()))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert out.strip() == "0", err


def test_migrations_render_for_postgres() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    config.set_main_option("sqlalchemy.url", "postgresql+psycopg://")
    config.output_buffer = buffer = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()):
            command.upgrade(config, "head", sql=True)
    except ModuleNotFoundError:
        pytest.skip("needs the PostgreSQL driver: pip install 'turnout[postgres]'")
    assert "CREATE TABLE client_rounds" in buffer.getvalue()


def test_every_statement_works_on_postgres(tmp_path: Path) -> None:
    url = os.environ.get("TURNOUT_TEST_POSTGRES")
    if not url:
        pytest.skip("set TURNOUT_TEST_POSTGRES to the URL of an empty PostgreSQL database")
    with RunStore(url) as store:
        store.create_run(run_row("a1"))
        store.record_initial("a1", {"accuracy": 0.1})
        store.commit_round(
            round_row("a1", 1, checkpoint="c"), {"evaluate": {"loss": math.nan}}, [client(2**64 - 1)],
            seconds=1, oldest_checkpoint=1,
        )  # fmt: skip
        assert store.client_rounds("a1")[0].client == 2**64 - 1
        store.reopen("a1", after_round=0, num_rounds=3, config={})
        store.finish("a1", "finished", seconds=2)
        assert store.run("a").status == "finished"
    engine = create_engine(database.store_url(url))
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    engine.dispose()
