"""Recorded runs whose per-client vectors live beside the checkpoints: cheap rounds, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from stopping import Stop, StopAfter

from turnout.server import RunDescription, RunRecorder, RunStore, model_sha256
from turnout.server.database import sqlite_path
from turnout.simulation import LocalGrid, Sampled
from turnout.strategies import MIFA, Callback, FedStale, FedVARP, RoundReport, StreamingStrategy
from turnout.wire import as_array, find, keys, load_checkpoint, view
from turnout.wire.columns import unpack
from turnout.wire.row_file import RowFile

CLIENTS, COHORT, SIZE, ROUNDS = 12, 5, 400, 9
KINDS = ["ram", "fp16", "mmap"]
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    config = message.content[keys.CONFIG]
    noise = np.random.default_rng([client, int(config[keys.SERVER_ROUND])])
    x = view(message.content[keys.ARRAYS]["w"])
    record = keys.GRADIENT if config[keys.LOCAL_UPDATE] == "anchor" else keys.ARRAYS
    content = RecordDict(
        {record: ArrayRecord({"w": as_array(x + noise.standard_normal(SIZE).astype(x.dtype))})}
    )
    content[keys.METRICS] = MetricRecord({"num-examples": client + 1, "client-id": client})
    return Message(content, reply_to=message)


def start(strategy: StreamingStrategy, *callbacks: Callback, resume: Any = None, rounds: int = ROUNDS) -> str:
    grid = LocalGrid(app, CLIENTS, participation=Sampled(CLIENTS, COHORT, seed=2))
    arrays = ArrayRecord({"w": as_array(np.zeros(SIZE, np.float32))})
    result = strategy.start(grid, arrays, num_rounds=rounds, resume_from=resume, callbacks=callbacks)
    return model_sha256(result.arrays)


def create(store: RunStore, **options: Any) -> RunRecorder:
    path = sqlite_path(store.url)
    assert path is not None
    run = RunDescription(
        name="m", strategy="s", task="t", seed=0, num_rounds=ROUNDS, num_clients=CLIENTS, config={}
    )
    return RunRecorder.create(store, path.parent, run, **options)


def stopped(store: RunStore, strategy: StreamingStrategy, after: int, **options: Any) -> RunRecorder:
    """A run that was interrupted in round ``after``, once it was committed."""
    recorder = create(store, **options)
    with pytest.raises(Stop), recorder:
        start(strategy, recorder, StopAfter(after))
    return recorder


def resumed(store: RunStore, recorder: RunRecorder, strategy: StreamingStrategy, **options: Any) -> str:
    run = store.run(recorder.run.id)
    again, tree = RunRecorder.resume(store, run, num_rounds=ROUNDS, config=run.config, **options)
    with again:
        return start(strategy, again, resume=tree)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3])
def test_resumed_at_any_round_it_ends_the_same(store: RunStore, kind: str, every: int) -> None:
    expected = start(FedVARP(memory=kind))
    for after in (1, 2, 5, 8):
        recorder = stopped(store, FedVARP(memory=kind), after, checkpoint_every=every)
        assert resumed(store, recorder, FedVARP(memory=kind), checkpoint_every=every) == expected, after


def test_mmap_and_ram_are_the_same_to_the_bit(store: RunStore) -> None:
    for make in (MIFA, FedVARP, FedStale):
        expected = start(make(memory="ram"))
        with create(store) as recorder:
            assert start(make(memory="mmap"), recorder) == expected


@pytest.mark.parametrize("slug", ["fedamd", "rerce-fed", "dual-admm"])
def test_every_strategy_with_a_memory_resumes(store: RunStore, slug: str) -> None:
    def made(memory: str) -> StreamingStrategy:
        strategy: StreamingStrategy = find("strategy", slug).target(memory=memory)
        return strategy

    recorder = stopped(store, made("mmap"), 6)
    assert resumed(store, recorder, made("mmap")) == start(made("ram"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_writes_the_rows_that_changed(
    store: RunStore, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    put = RowFile.put
    monkeypatch.setattr(RowFile, "put", lambda file, key, row: (written.append(key), put(file, key, row)))
    sizes: list[tuple[int, int]] = []

    class Count(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            assert recorder.last_checkpoint is not None
            sizes.append((len(written), recorder.last_checkpoint.bytes))

    with create(store) as recorder:
        start(FedVARP(memory=kind), recorder, Count())
    counts = np.diff([count for count, _ in sizes])
    assert (counts == COHORT).all(), "more rows than clients that took part"
    assert max(size for _, size in sizes) < 3 * 8 * SIZE  # The model and the total, not N vectors.
    (rows,) = recorder.directory.path.glob("checkpoints/*.rows")
    # All clients, what took their place since the older checkpoint, and a round on its way.
    assert rows.stat().st_size <= (CLIENTS + 3 * COHORT) * (4 * SIZE + 128)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_row_costs_the_rounds_since_a_whole_checkpoint(store: RunStore, kind: str) -> None:
    recorder = stopped(store, FedVARP(memory=kind), 6)
    (rows,) = recorder.directory.path.glob("checkpoints/*.rows")
    newest = load_checkpoint(recorder.directory.checkpoint(6))["strategy"]["state"]["stale"]["memory"]["rows"]
    before = load_checkpoint(recorder.directory.checkpoint(5))["strategy"]["state"]["stale"]["memory"]["rows"]
    slots = [_slots(newest), _slots(before)]
    (client, *_) = (key for key in slots[0] if slots[0][key] not in slots[1].values())
    data = bytearray(rows.read_bytes())
    data[slots[0][client] * newest.format.stride + 70] ^= 1
    rows.write_bytes(data)
    run = store.run(recorder.run.id)
    again, tree = RunRecorder.resume(store, run, num_rounds=ROUNDS, config=run.config)
    assert tree is not None
    assert tree["round"] == 5
    with again:
        assert start(FedVARP(memory=kind), again, resume=tree) == start(FedVARP(memory=kind))


def _slots(rows: Any) -> dict[int, int]:
    return {key: int(slot) for key, slot in enumerate(unpack(rows.slots, np.int64)) if slot >= 0}


def test_a_named_directory_keeps_the_rows(store: RunStore, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    recorder = stopped(store, FedVARP(memory=f"mmap:{disk}"), 4)
    assert [path.name for path in disk.iterdir()] == [f"{recorder.run.id}-stale.rows"]
    assert resumed(store, recorder, FedVARP(memory=f"mmap:{disk}")) == start(FedVARP())


def test_another_run_from_its_checkpoint_leaves_a_run_alone(store: RunStore, tmp_path: Path) -> None:
    """Only the run's recorder may write to its rows; everyone else gets a copy."""
    recorder = stopped(store, FedVARP(memory="mmap"), 5)
    (rows,) = recorder.directory.path.glob("checkpoints/*.rows")
    before = rows.read_bytes()
    checkpoint = recorder.directory.checkpoint(5)
    expected = start(FedVARP())
    for kind in ("mmap", f"mmap:{tmp_path}"):
        assert start(FedVARP(memory=kind), resume=checkpoint) == expected
    assert rows.read_bytes() == before
    assert resumed(store, recorder, FedVARP(memory="mmap")) == expected


def test_one_strategy_used_for_two_runs(store: RunStore) -> None:
    strategy = FedVARP(memory="mmap")
    recorder = stopped(store, strategy, 5)
    expected = start(strategy)
    assert resumed(store, recorder, FedVARP(memory="mmap")) == expected
