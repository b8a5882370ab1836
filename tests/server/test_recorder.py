from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import Result
from safetensors.numpy import load_file

from turnout.server import RunDescription, RunRecorder, RunStore, StoreError, model_sha256
from turnout.strategies import ClientReport, RoundReport
from turnout.wire import CheckpointError, load_checkpoint

Report = Callable[..., RoundReport]


@pytest.fixture
def recorder(store: RunStore, description: RunDescription, tmp_path: Path) -> RunRecorder:
    return RunRecorder.create(store, tmp_path / "runs", description)


def lines(recorder: RunRecorder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recorder.directory.metrics_file.read_text().splitlines()]


def resume(store: RunStore, run_id: str, **changes: Any) -> tuple[RunRecorder, dict[str, Any] | None]:
    run = store.run(run_id)
    return RunRecorder.resume(store, run, **{"num_rounds": run.num_rounds, "config": run.config, **changes})


def test_a_round_is_on_disk_and_in_the_store(recorder: RunRecorder, report: Report) -> None:
    recorder.record_initial({"accuracy": 0.05, "loss": math.nan})
    recorder.on_round_end(report(1, loss=math.nan))
    (row,) = recorder.store.rounds(recorder.run.id)
    assert (row.invited, row.participants, row.failed, row.missing) == (3, 2, 1, 0)
    assert row.checkpoint == "round-000001.safetensors"
    tree = load_checkpoint(recorder.directory.checkpoint(1))
    assert tree["round"] == 1
    assert np.array_equal(tree["strategy"]["x"], np.full(3, 1.0))
    clients = recorder.store.client_rounds(recorder.run.id)
    assert [(c.client, c.outcome, c.weight) for c in clients] == [
        (0, "ok", 0.25),
        (2, "ok", 0.75),
        (3, "failed", None),
    ]
    assert "boom" in (clients[2].reason or "")
    first, second = lines(recorder)
    assert first == {"round": 0, "evaluate": {"accuracy": 0.05, "loss": None}}
    assert second["evaluate"] == {"accuracy": 0.1, "loss": None}
    assert second["participants"] == 2


def test_two_checkpoints_are_kept(recorder: RunRecorder, report: Report) -> None:
    for number in range(1, 6):
        recorder.on_round_end(report(number))
    names = sorted(p.name for p in (recorder.directory.path / "checkpoints").iterdir())
    assert names == ["round-000004.safetensors", "round-000005.safetensors"]
    noted = [row.checkpoint for row in recorder.store.rounds(recorder.run.id) if row.checkpoint]
    assert noted == names


def test_checkpoints_may_be_rarer_but_the_last_round_has_one(
    store: RunStore, description: RunDescription, tmp_path: Path, report: Report
) -> None:
    recorder = RunRecorder.create(store, tmp_path / "runs", description, checkpoint_every=4)
    for number in range(1, 7):
        recorder.on_round_end(report(number))
    noted = [row.round for row in store.rounds(recorder.run.id) if row.checkpoint]
    assert noted == [4, 6]


def test_a_crash_before_the_commit_leaves_the_previous_round(
    recorder: RunRecorder, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.on_round_end(report(1))
    monkeypatch.setattr(recorder.store, "commit_round", _power_cut)
    with pytest.raises(RuntimeError), recorder:
        recorder.on_round_end(report(2))
    monkeypatch.undo()
    assert recorder.directory.checkpoint(2).exists()
    run = recorder.store.run(recorder.run.id)
    assert (run.status, run.error) == ("failed", "RuntimeError: power cut")
    again, tree = resume(recorder.store, run.id)
    assert tree is not None
    assert tree["round"] == 1
    again.on_round_end(report(2))
    again.on_round_end(report(3))
    assert [row.round for row in again.store.rounds(run.id)] == [1, 2, 3]
    again.directory.release()


def test_a_crash_after_the_commit_loses_nothing(
    recorder: RunRecorder, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.on_round_end(report(1))
    monkeypatch.setattr(recorder.directory, "append_metrics", _power_cut)
    with pytest.raises(RuntimeError):
        recorder.on_round_end(report(2))
    recorder.directory.release()
    again, tree = resume(recorder.store, recorder.run.id)
    assert tree is not None
    assert tree["round"] == 2
    assert [line["round"] for line in lines(again)] == [1, 2]  # The line that was never written is there.
    again.directory.release()


def test_lines_beyond_the_checkpoint_are_cut(
    store: RunStore, description: RunDescription, tmp_path: Path, report: Report
) -> None:
    recorder = RunRecorder.create(store, tmp_path / "runs", description, checkpoint_every=3)
    recorder.record_initial({"accuracy": 0.0})
    for number in range(1, 6):
        recorder.on_round_end(report(number))
    before = recorder.directory.metrics_file.read_text().splitlines()
    with recorder.directory.metrics_file.open("a") as file:
        file.write('{"round": 6, "torn')
    recorder.directory.release()
    again, tree = resume(store, recorder.run.id)
    assert tree is not None
    assert tree["round"] == 3
    assert again.directory.metrics_file.read_text().splitlines() == before[:4]
    assert again.last_metrics["accuracy"] == pytest.approx(0.3)
    again.directory.release()


def test_a_damaged_checkpoint_costs_one_round(recorder: RunRecorder, report: Report) -> None:
    for number in (1, 2, 3):
        recorder.on_round_end(report(number))
    recorder.directory.release()
    newest = recorder.directory.checkpoint(3)
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 0xFF
    newest.write_bytes(damaged)
    again, tree = resume(recorder.store, recorder.run.id)
    assert tree is not None
    assert tree["round"] == 2
    again.directory.release()
    newest.unlink()
    again.directory.checkpoint(2).unlink()
    with pytest.raises(CheckpointError, match="start a new run"):
        resume(recorder.store, recorder.run.id)


def test_a_run_without_a_round_starts_again(recorder: RunRecorder) -> None:
    recorder.record_initial({"accuracy": 0.2})
    with pytest.raises(KeyboardInterrupt), recorder:
        raise KeyboardInterrupt
    assert recorder.store.run(recorder.run.id).status == "interrupted"
    again, tree = resume(recorder.store, recorder.run.id)
    assert tree is None
    assert again.last_round == 0
    again.directory.release()


def test_nothing_is_left_when_the_store_refuses(
    store: RunStore, description: RunDescription, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "create_run", _power_cut)
    with pytest.raises(RuntimeError):
        RunRecorder.create(store, tmp_path / "runs", description)
    assert [p.name for p in (tmp_path / "runs").iterdir() if not p.name.startswith("turnout.sqlite")] == []


def test_the_end_of_a_run(recorder: RunRecorder, report: Report, arrays: Any) -> None:
    with recorder:
        recorder.on_round_end(report(1))
        recorder.on_finish(report(1).strategy, Result(arrays=arrays))
    run = recorder.store.run(recorder.run.id)
    assert run.status == "finished"
    assert run.model_sha256 == recorder.model_sha256 == model_sha256(arrays)
    assert run.finished_at is not None
    tensors = load_file(recorder.directory.model_file)
    assert np.array_equal(tensors["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert tensors["steps"].tolist() == [3]
    config = json.loads(recorder.directory.model_file.with_name("config.json").read_text())
    assert config["model-sha256"] == run.model_sha256
    with (recorder.directory.path / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["client"] for row in rows] == ["0", "2", "3"]


def test_a_client_reported_twice_took_part_once(recorder: RunRecorder, report: Report) -> None:
    twice = [
        ClientReport(1, "rejected", "duplicate: second reply"),
        ClientReport(1, "ok", "", 5, 1.0, 0, 0.1, 0.1),
        ClientReport(1, "rejected", "duplicate: third reply"),
    ]
    recorder.on_round_end(report(1, clients=twice))
    (row,) = recorder.store.rounds(recorder.run.id)
    assert (row.invited, row.participants, row.rejected) == (1, 1, 0)


def test_a_client_folded_twice_is_not_committed(recorder: RunRecorder, report: Report) -> None:
    twice = [ClientReport(1, "ok", "", 5, 0.5), ClientReport(1, "ok", "", 5, 0.5)]
    with pytest.raises(StoreError, match="client 1 was folded twice"):
        recorder.on_round_end(report(1, clients=twice))
    assert recorder.store.rounds(recorder.run.id) == []
    assert list((recorder.directory.path / "checkpoints").iterdir()) == []


def test_the_ledger_columns_come_from_the_report(recorder: RunRecorder, report: Report, arrays: Any) -> None:
    sent = {"loss": 0.5, "nan": math.nan, "inf": -math.inf, "long" * 50: 1, "flag": True}
    many = {f"m{i}": i for i in range(100)}
    clients = [
        ClientReport(1, "ok", metrics=sent, task=2**63 - 1, attempt=2, reply_crc32=2**32 - 1),
        ClientReport(2, "ok", metrics=many),
        ClientReport(3, "missing"),
    ]
    recorder.on_round_end(report(1, clients=clients))
    recorder.on_round_end(report(2, clients=[]))
    first, second = recorder.store.rounds(recorder.run.id)
    assert first.model_sha256 == second.model_before_sha256 == second.model_sha256 == model_sha256(arrays)
    assert first.checkpoint_seconds is not None
    one, two, three = recorder.store.client_rounds(recorder.run.id)
    assert (one.task, one.attempt, one.reply_crc32) == (2**63 - 1, 2, 2**32 - 1)
    assert one.metrics == {"loss": 0.5, ("long" * 50)[:64]: 1.0, "flag": 1.0}
    assert two.metrics == {f"m{i}": float(i) for i in range(64)}
    assert (two.task, two.reply_crc32, three.metrics) == (None, None, None)


def test_what_a_fleet_says_is_written_when_it_changes(
    recorder: RunRecorder, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from turnout.server.fleet import FleetCounters, Roster

    roster, counters = Roster(), FleetCounters(sent_bytes=100, received_bytes=10)
    for number in (0, 1):
        roster.admit(f"n{number}", [None])
        roster.describe(number, device="cpu", examples=5, tags={"site": "x"})
    grid = SimpleNamespace(server=SimpleNamespace(roster=roster, counters=counters))
    written: list[list[int]] = []
    commit = recorder.store.commit_round

    def watch(*args: Any, members: Any, **kwargs: Any) -> None:
        written.append([entry["client"] for entry in members])
        commit(*args, members=members, **kwargs)

    monkeypatch.setattr(recorder.store, "commit_round", watch)
    recorder.on_round_end(dataclasses.replace(report(1), grid=grid))
    recorder.on_round_end(dataclasses.replace(report(2), grid=grid))
    roster.members[1].offences = 2
    roster.describe(0, device="cuda", examples=6, tags={})
    counters.sent_bytes += 50
    recorder.on_round_end(dataclasses.replace(report(3), grid=grid))
    assert written == [[0, 1], [], [0, 1]]
    first, second = recorder.store.clients(recorder.run.id)
    assert (first.name, first.device, first.examples, first.tags) == ("n0", "cuda", 6, {})
    assert (second.device, second.offences, second.tags) == ("cpu", 2, {"site": "x"})
    assert [row.sent_bytes for row in recorder.store.rounds(recorder.run.id)] == [100, 0, 50]


def test_an_empty_round_is_a_round(recorder: RunRecorder, report: Report) -> None:
    recorder.on_round_end(report(1, clients=[]))
    (row,) = recorder.store.rounds(recorder.run.id)
    assert (row.invited, row.participants) == (0, 0)


def _power_cut(*_: Any, **__: Any) -> None:
    raise RuntimeError("power cut")


_ENDLESS = """
    import sys, numpy as np
    from flwr.app import ArrayRecord
    from turnout.server import RunDescription, RunRecorder, RunStore
    from turnout.strategies import ClientReport, RoundReport
    from turnout.wire import as_array

    arrays = ArrayRecord({"w": as_array(np.zeros(4, np.float32))})

    class State:
        def keep_rows(self, directory, run):
            pass

        def state_dict(self):
            return {"x": np.full(20_000, float(self.round))}

    store = RunStore(sys.argv[1])
    about = RunDescription(
        name="kill", strategy="s", task="t", seed=0, num_rounds=10**6, num_clients=9, config={}
    )
    recorder = RunRecorder.create(store, sys.argv[1], about)
    state, number = State(), 0
    while True:
        number += 1
        state.round = number
        clients = [ClientReport(i, "ok", "", 1, 0.1) for i in range(9)]
        metrics = {"loss": 1.0 / number}
        recorder.on_round_end(
            RoundReport(number, arrays, metrics, metrics, {}, clients, {}, state, object())
        )
        print(number, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_continues_after_its_last_committed_round(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_ENDLESS), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 8:
            break
    time.sleep(0.037)
    os.kill(process.pid, signal.SIGKILL)
    told = [int(line) for line in process.stdout.read().split()] or [8]
    process.wait()
    with RunStore(tmp_path, create=False) as store:
        run = store.run("last")
        recorder, tree = resume(store, run.id)
        assert tree is not None
        assert tree["round"] >= told[-1]  # What was said to be committed is.
        rounds = [row.round for row in store.rounds(run.id)]
        assert rounds == list(range(1, tree["round"] + 1))
        assert [line["round"] for line in lines(recorder)] == rounds
        assert len(store.client_rounds(run.id)) == 9 * len(rounds)
        assert np.array_equal(tree["strategy"]["x"], np.full(20_000, float(tree["round"])))
        recorder.directory.release()
