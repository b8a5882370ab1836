"""Mutated frames over live streams: rounds go on for everybody else, and memory stays where it was."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import as_array
from turnout.wire.framing import encode_chunk
from turnout.wire.packing import BlockLayout, unpack
from turnout.wire.replies import INLINE_BYTES, EncodedReply, encode_reply

pytestmark = pytest.mark.alone

FRAMES = int(os.environ.get("TURNOUT_FUZZ_LIVE", "2000"))
SEED = int(os.environ.get("TURNOUT_FUZZ_SEED", "20261122"))
PER_STREAM = 5


class Stop(Exception):  # noqa: N818 - the test's own end
    pass


class Until(Callback):
    """Ends the run, at the end of a round, once ``done`` is set."""

    def __init__(self, done: threading.Event) -> None:
        self._done = done
        self.rounds: list[float] = []

    def on_round_end(self, report: RoundReport) -> None:
        self.rounds.append(time.monotonic())
        if self._done.is_set():
            raise Stop


def resident() -> int:
    """Return the bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def correct_reply(offer: pb.TaskOffer) -> EncodedReply:
    """Return a reply of zeros, without waiting for the model, which a short round may take back."""
    work = pb.Work.FromString(offer.work)
    block = next(record.arrays for record in work.records if record.HasField("arrays"))
    layout = BlockLayout.parse(block.layout)
    metrics = MetricRecord({"num-examples": 1, "client-id": offer.client})
    content = RecordDict({"arrays": unpack(layout, np.zeros(layout.size, np.uint8)), "metrics": metrics})
    return encode_reply(content, {block.layout_digest: layout})


def hostile_frames(offer: pb.TaskOffer, fuzzing: ModuleType, rng: random.Random) -> list[bytes]:
    """Return frames around a task that is open right now, most of them broken."""
    reply = correct_reply(offer)
    body = b"".join(reply.pieces) if reply.size <= INLINE_BYTES else b""
    ready = pb.ClientMessage(
        ready=pb.Ready(task=offer.id, attempt=offer.attempt, head=reply.head, size=reply.size,
                       checksum=reply.checksum, data=body, metrics={"seconds": 1.0})
    )  # fmt: skip
    progress = pb.ClientMessage(progress=pb.Progress(client=offer.client, task=offer.id, metrics={"a": 1.0}))
    seeds = [ready.SerializeToString(), progress.SerializeToString(), encode_chunk(offer.id, 0, b"x" * 100)]
    seeds.append(pb.ClientMessage(batch=pb.Batch(messages=seeds[:2])).SerializeToString())
    target = fuzzing.Target("live", None, tuple(seeds), pb.ClientMessage)
    return [raw for _, raw in fuzzing.Mutator([target], rng.randrange(2**32)).inputs(PER_STREAM)]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of a process in /proc")
@pytest.mark.timeout(120 + FRAMES // 50)
@pytest.mark.parametrize("size", [400, 20_000], ids=["inline", "chunked"])
def test_rounds_go_on_while_one_client_sends_noise(
    size: int,
    spawn: Callable[..., Any],
    raw_client: ModuleType,
    fuzzing: ModuleType,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = FleetOptions(enough=2, deadline=5, quorum=2, reconnect=0.5, max_offences=10**9, stall=1)
    done = threading.Event()
    errors: list[BaseException] = []
    with FleetServer(options=options) as server:
        spawn("numpy_app.py", server.address, "0-1", "--echo")
        grid, strategy, until = FleetGrid(server, min_clients=2, wait=10), FedAvg(), Until(done)
        vector = np.zeros(size, np.float32)
        arrays = ArrayRecord({"w": as_array(vector[: size // 2]), "b": as_array(vector[size // 2 :])})

        def train() -> None:
            try:
                strategy.start(
                    grid, arrays, num_rounds=10**6, timeout=20, callbacks=[CommitCallback(grid), until]
                )
            except BaseException as error:
                errors.append(error)

        running = threading.Thread(target=train, daemon=True)
        running.start()
        rng = random.Random(SEED)
        sent = streams = 0
        memory = 0
        began = time.monotonic()
        while sent < FRAMES and running.is_alive():
            streams += 1
            with raw_client.RawClient(server.address, "bad", 5) as bad, contextlib.suppress(grpc.RpcError):
                for raw in hostile_frames(bad.receive("task"), fuzzing, rng):
                    bad.send_bytes(raw)
                    sent += 1
                bad.send_bytes(b"\xff")  # If nothing has ended the stream, this does.
                bad.receive("nothing")
            if sent >= FRAMES // 4 and not memory:
                memory = resident()  # When all that is allocated once has been.
        seconds = time.monotonic() - began
        growth = resident() - memory
        done.set()
        running.join(20)
    gaps = [b - a for a, b in itertools.pairwise(until.rounds)]
    with capsys.disabled():
        print(
            f"\nlive fuzz: seed {SEED}, {sent} frames on {streams} streams in {seconds:.1f} s, "
            f"{len(until.rounds)} rounds, longest {max(gaps):.2f} s, memory +{growth / 1e6:.1f} MB, "
            f"reasons {dict(server.counters.reasons)}"
        )
    assert [type(error) for error in errors] == [Stop], errors
    assert len(until.rounds) > 10
    assert max(gaps) < 5
    assert np.isfinite(strategy.x).all()
    assert server.hub.slots.busy == 0
    assert server.counters.reasons["bad-frame"] > 0
    assert growth < 64 << 20
    assert not [r for r in caplog.records if r.levelname in ("ERROR", "CRITICAL")]
