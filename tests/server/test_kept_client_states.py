"""Recorded runs whose clients keep state: rows beside the checkpoints, resumed bit for bit, little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from stopping import Stop, StopAfter

from turnout.server import RunDescription, RunRecorder, RunStore, model_sha256
from turnout.server import recorder as recorder_module
from turnout.server.database import sqlite_path
from turnout.simulation import LocalGrid, Sampled
from turnout.simulation.state_files import decode
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.wire import CheckpointError, as_array, keys, view
from turnout.wire.row_file import RowFile

CLIENTS, COHORT, SIZE, ROUNDS = 12, 5, 400, 9
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Descend with momentum that the client keeps; client 1 forgets it, client 2 keeps ever more."""
    client, state = int(context.node_config["partition-id"]), context.state
    server_round = int(message.content[keys.CONFIG][keys.SERVER_ROUND])
    x = view(message.content[keys.ARRAYS]["w"])
    momentum = 0.9 * view(state["kept"]["m"]) if "kept" in state else np.zeros(SIZE)
    momentum = momentum + x + np.random.default_rng([client, server_round]).standard_normal(SIZE)
    if client == 1 and "kept" in state:
        state.clear()
    else:
        state["kept"] = ArrayRecord({"m": as_array(momentum)})
    if client == 2:
        longer = np.ones(1 + len(view(state["more"]["n"])) if "more" in state else 1, np.int16)
        state["more"] = ArrayRecord({"n": as_array(np.repeat(longer, 60 if len(longer) < 99 else 1))})
        momentum = momentum * longer.size
    content = RecordDict({keys.ARRAYS: ArrayRecord({"w": as_array((x - 0.01 * momentum).astype(x.dtype))})})
    content[keys.METRICS] = MetricRecord({"num-examples": client + 1, "client-id": client})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    known = float(view(context.state["kept"]["m"]).sum()) if "kept" in context.state else 0.0
    return Message(
        RecordDict({keys.METRICS: MetricRecord({"num-examples": 1, "known": known})}), reply_to=message
    )


def make_grid(**options: Any) -> LocalGrid:
    return LocalGrid(app, CLIENTS, participation=Sampled(CLIENTS, COHORT, seed=2), **options)


def start(*callbacks: Callback, resume: Any = None, grid: LocalGrid | None = None) -> str:
    arrays = ArrayRecord({"w": as_array(np.zeros(SIZE, np.float32))})
    result = FedAvg().start(
        grid or make_grid(),
        arrays,
        num_rounds=ROUNDS,
        evaluate_config=ConfigRecord(),
        resume_from=resume,
        callbacks=callbacks,
    )
    known = [m["known"] for m in result.evaluate_metrics_clientapp.values()]
    return f"{model_sha256(result.arrays)} {known[-1]}"


def create(store: RunStore, **options: Any) -> RunRecorder:
    path = sqlite_path(store.url)
    assert path is not None
    run = RunDescription(
        name="m", strategy="s", task="t", seed=0, num_rounds=ROUNDS, num_clients=CLIENTS, config={}
    )
    return RunRecorder.create(store, path.parent, run, **options)


def stopped(store: RunStore, after: int, **options: Any) -> RunRecorder:
    """A run that was interrupted in round ``after``, once it was committed."""
    recorder = create(store, **options)
    with pytest.raises(Stop), recorder:
        start(recorder, StopAfter(after))
    return recorder


def resumed(store: RunStore, recorder: RunRecorder, *, grid: LocalGrid | None = None, **options: Any) -> str:
    run = store.run(recorder.run.id)
    again, tree = RunRecorder.resume(store, run, num_rounds=ROUNDS, config=run.config, **options)
    with again:
        return start(again, resume=tree, grid=grid)


def in_memory(grid: LocalGrid) -> int:
    return len(grid._clients.states._held)


@pytest.mark.parametrize("every", [1, 3])
def test_resumed_at_any_round_it_ends_the_same(store: RunStore, every: int) -> None:
    expected = start()
    for after in (1, 4, 8):
        recorder = stopped(store, after, checkpoint_every=every)
        assert resumed(store, recorder, checkpoint_every=every) == expected, after


@pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
def test_states_beyond_the_bound_are_in_files(store: RunStore, executor: str) -> None:
    """Nothing may stay in memory here: every state is read from its file when its client comes again."""
    expected, grid = start(), make_grid(executor=executor, workers=2, state_bytes=0)
    assert start(grid=grid) == expected
    assert in_memory(grid) <= COHORT
    assert grid.state_dict()["clients"].keys() >= {"2", "3", "4"}  # All of them, wherever they are.
    recorder = stopped(store, 5)
    again = make_grid(executor=executor, workers=2, state_bytes=0)
    assert resumed(store, recorder, grid=again) == expected
    assert in_memory(again) <= COHORT


def test_a_checkpoint_writes_the_states_that_changed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that only evaluate, and read their state for it, cost nothing."""
    written: list[int] = []
    put = RowFile.put
    monkeypatch.setattr(RowFile, "put", lambda file, key, row: (written.append(key), put(file, key, row)))
    counts: list[int] = []

    class Count(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            counts.append(len(written))
            assert recorder.last_checkpoint is not None
            assert recorder.last_checkpoint.bytes < 3 * 8 * SIZE  # The model, not N states.

    with create(store) as recorder:
        start(recorder, Count())
    assert np.diff(counts).max() <= COHORT
    assert counts[-1] >= (ROUNDS - 1) * (COHORT - 1)
    files = list(recorder.directory.path.glob("checkpoints/clients-*.rows"))
    # All clients, what took their place since the older checkpoint, and a round on its way.
    assert sum(file.stat().st_size for file in files) <= (CLIENTS + 3 * COHORT) * (8 * SIZE + 1024)


@pytest.mark.parametrize("torn", [False, True])
def test_killed_between_rows_and_checkpoint(
    store: RunStore, torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a round that was not committed, whole or half, are in nobody's way."""

    def killed(path: Path, tree: Any) -> None:
        if path.name == "round-000006.safetensors":
            raise Stop
        save(path, tree)

    def write(file: RowFile, slot: int, key: int, row: np.ndarray) -> None:
        begun.append(key)
        written(file, slot, key, np.zeros_like(row) if torn and len(begun) > 26 else row)

    begun: list[int] = []
    save, written, expected = recorder_module.save_checkpoint, RowFile._write, start()
    with monkeypatch.context() as patch:
        patch.setattr(recorder_module, "save_checkpoint", killed)
        patch.setattr(RowFile, "_write", write)
        with pytest.raises(Stop), create(store) as recorder:
            start(recorder)
    assert len(begun) > 26
    assert store.rounds(recorder.run.id)[-1].round == 5
    assert resumed(store, recorder) == expected


def test_another_run_from_its_checkpoint_leaves_a_run_alone(store: RunStore) -> None:
    """Only the run's recorder may write to its rows; everyone else gets a copy."""
    recorder, expected = stopped(store, 5), start()
    files = sorted(recorder.directory.path.glob("checkpoints/clients-*.rows"))
    before = [file.read_bytes() for file in files]
    assert before
    assert start(resume=recorder.directory.checkpoint(5)) == expected
    assert [file.read_bytes() for file in files] == before


def test_one_grid_used_for_two_runs(store: RunStore) -> None:
    """The second run's checkpoints refer to its own files, which have what the first run's clients kept."""
    grid = make_grid()
    with create(store) as first:
        start(first, grid=grid)
    with pytest.raises(Stop), create(store) as second:
        start(second, StopAfter(4), grid=grid)
    tree = grid.state_dict()["clients"]["rows"]
    assert {rows.path.parent for rows in tree.values()} == {second.directory.path / "checkpoints"}
    assert sum(len(list(rows)) for rows in tree.values()) >= CLIENTS - 1
    resumed(store, second)


@pytest.mark.parametrize("text", [b"", b"{", b'[["a","arrays",[["b",{"@":999,"dtype":"<f4","shape":[4]}]]]]'])
def test_rows_that_are_no_states_are_refused(text: bytes) -> None:
    row = np.zeros(256, np.uint8)
    row[: 4 + len(text)] = np.frombuffer(len(text).to_bytes(4, "little") + text, np.uint8)
    with pytest.raises(CheckpointError, match="a client's state in the checkpoint is not readable"):
        decode(row)
