"""Whatever bytes come, only the typed refusals leave the parsers, and nothing large is allocated."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from turnout.server.fleet import FleetOptions, FleetServer
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.framing import MAX_FRAME_BYTES

INPUTS = int(os.environ.get("TURNOUT_FUZZ", "100000"))
SEED = int(os.environ.get("TURNOUT_FUZZ_SEED", "20261122"))
CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))


@pytest.fixture(scope="module")
def recorded(raw_client: ModuleType, round_of: Callable[..., Any]) -> tuple[list[bytes], list[bytes]]:
    """Return every frame that clients and a server exchanged in real rounds, small and large models."""
    sent: list[bytes] = []
    received: list[bytes] = []

    class Recorder(raw_client.RawClient):  # type: ignore[misc, name-defined]
        def send(self, **body: Any) -> None:
            sent.append(pb.ClientMessage(**body).SerializeToString())
            super().send(**body)

        def send_bytes(self, raw: bytes) -> None:
            sent.append(raw)
            super().send_bytes(raw)

        def _read(self) -> None:
            call = self.call
            self.call = iter([raw := next(call)])
            received.append(raw)
            try:
                super()._read()
            finally:
                self.call = call

    for size in (400, 20_000):
        with (
            FleetServer(options=FleetOptions(), run_config={"rate": 0.1, "name": "run"}) as server,
            Recorder(server.address, "a", 0, clients=[pb.LogicalClient(partition=0, tags={"k": "v"})]) as one,
        ):
            server.incarnation = 1  # Numbers tasks: the same seed then gives the same inputs.
            running = round_of(server, 1, size, rounds=2)
            for _ in range(2):
                one.finish(one.receive("task"))
            assert running.result() == {0: ("ok", "")}
            one.send(progress=pb.Progress(client=0, task=1, metrics={"seconds": 1.5}))
            one.send(heartbeat=pb.Heartbeat(sequence=3))
            one.send(goodbye=pb.Goodbye(reason="done"))
    short = [frame for frame in sent if len(frame) < 4096][:6]
    sent.append(pb.ClientMessage(batch=pb.Batch(messages=short)).SerializeToString())
    return list(dict.fromkeys(sent)), list(dict.fromkeys(received))


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """Return a folder in memory where there is one: thousands of small files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def targets(
    fuzzing: ModuleType, recorded: tuple[list[bytes], list[bytes]], memory_folder: Path
) -> dict[str, Any]:
    sent, received = recorded
    messages = [pb.ServerMessage.FromString(raw) for raw in received]
    parts = [pb.ServerMessage.FromString(raw) for message in messages for raw in message.batch.messages]
    works = [m.task.work for m in [*messages, *parts] if m.HasField("task")]
    heads = [m.ready.head for m in map(pb.ClientMessage.FromString, sent) if m.HasField("ready")]
    whole = pb.ReplyHead.FromString(heads[0])  # With its layout, as a client that compresses sends it.
    whole.records[0].arrays.layout_digest = b""
    whole.records[0].arrays.layout.CopyFrom(fuzzing.MODEL.message)
    heads.append(whole.SerializeToString())
    heads.append(pb.ReplyHead(error="the app failed").SerializeToString())
    small = [frame for frame in sent if len(frame) < 8192]
    config = pb.Work.FromString(works[0]).records
    scalars = [r.config.SerializeToString() for r in config if r.HasField("config")]
    scalars += [r.metrics.SerializeToString() for r in whole.records if r.HasField("metrics")]
    files = fuzzing.CheckpointFile(memory_folder)
    target = fuzzing.Target
    rows = [
        target("client-frame", fuzzing.client_frame, tuple(small * 4 + sent), pb.ClientMessage, share=5),
        target(
            "server-frame",
            fuzzing.server_frame,
            tuple(received),
            pb.ServerMessage,
            share=3,
            allowed=fuzzing.TYPED,
        ),
        target("reply-head", fuzzing.reply_head, tuple(heads), pb.ReplyHead, share=5),
        target("layout", fuzzing.layout, (fuzzing.MODEL.message.SerializeToString(),), pb.Layout, share=3),
        target("scalars", fuzzing.scalars, tuple(scalars), pb.Scalars, share=2),
        # A node answers whatever goes wrong in decoding its work with a failure.
        target("work", fuzzing.work, tuple(works), pb.Work, share=2, allowed=fuzzing.TYPED),
        target("npy", fuzzing.npy, tuple(fuzzing.npy_seeds())),
        target("checkpoint", files, tuple(files.seeds()), share=2),
    ]
    return {row.name: row for row in rows}


@pytest.mark.timeout(120 + INPUTS // 200)
def test_only_typed_errors_leave_the_parsers(
    targets: dict[str, Any], fuzzing: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = refused = largest = 0
    began, cpu = time.monotonic(), time.process_time()
    counts: dict[str, list[int]] = {name: [0, 0] for name in targets}
    tracemalloc.start()
    try:
        for target, raw in fuzzing.Mutator(list(targets.values()), SEED).inputs(INPUTS):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                target.parse(raw)
                counts[target.name][0] += 1
            except target.allowed:
                refused += 1
                counts[target.name][1] += 1
            except Exception as error:
                kept = fuzzing.keep(target.name, raw)
                raise AssertionError(
                    f"seed {SEED}: {error!r} left the parser; input kept as {kept}"
                ) from error
            used = tracemalloc.get_traced_memory()[1] - before
            largest = max(largest, used)
            inputs += 1
            if used > 2 * MAX_FRAME_BYTES:
                kept = fuzzing.keep(target.name, raw)
                raise AssertionError(f"seed {SEED}: {used} bytes for {len(raw)}; input kept as {kept}")
    finally:
        tracemalloc.stop()
    seconds, used_cpu = time.monotonic() - began, time.process_time() - cpu
    with capsys.disabled():
        print(
            f"\nfuzz: seed {SEED}, {inputs} inputs in {seconds:.1f} s ({used_cpu:.1f} s of CPU), "
            f"{refused} refused, crashes 0, largest allocation {largest / 1e6:.2f} MB; taken/refused {counts}"
        )
    assert all(taken and rest for taken, rest in counts.values())  # Both ways are walked.


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_inputs_that_once_failed(path: Path, targets: dict[str, Any], fuzzing: ModuleType) -> None:
    target = targets[path.stem.rpartition("-")[0]]
    with contextlib.suppress(*target.allowed):
        target.parse(path.read_bytes())
