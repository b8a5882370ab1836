"""The same faults through ``turnout server``, as an operator has it."""

from __future__ import annotations

import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from chaos_harness import CLIENTS, Fleet, free_port, twin, until, zeros
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save_file

from turnout.server.store import RunStore
from turnout.wire import view

EXPERIMENT = f"""
[run]
rounds = 8
[task]
name = "external"
model = "initial.safetensors"
num_clients = {CLIENTS}
[strategy]
name = "scaffold"
"""


class Command:
    """``turnout server`` in a folder, with nodes that stay up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        save_file({"w": view(zeros()["w"])}, folder / "initial.safetensors")
        (folder / "chaos.toml").write_text(EXPERIMENT)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "turnout.cli", "server", *arguments, "--address", self.address]
        self.process = subprocess.Popen([*command, "--no-plots", "--quiet", "--json"], cwd=self.folder)
        return self.process

    def rounds(self) -> int:
        if not (self.folder / "runs" / "turnout.sqlite").exists():
            return 0
        with RunStore(self.folder / "runs", create=False) as store:
            runs = store.runs(limit=1)
            return store.rounds_done([runs[0].id]).get(runs[0].id, 0) if runs else 0

    def wait_for_round(self, number: int) -> None:
        assert self.process is not None
        process = self.process
        until(lambda: self.rounds() >= number or process.poll() is not None, what=self.rounds)
        assert process.poll() is None


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    # Slow enough that every signal falls into a round.
    fleet = Fleet(tmp_path, made.address, pause=0.3).start_all()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait(10)
    fleet.close()


def test_killed_and_resumed_by_command(command: Command, rng: random.Random) -> None:
    process = command.start("chaos.toml")
    for number in (1, 2):
        command.wait_for_round(command.rounds() + 1)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait(10)
        done = command.rounds()
        process = command.start("--resume", "last")
        command.wait_for_round(done + 1)
        assert number <= done < 8
    _finish(command, process)


def test_sigterm_drains(command: Command) -> None:
    """Health says NOT_SERVING, the round in progress is committed, the process ends with 0, nodes stay."""
    process = command.start("chaos.toml")
    command.wait_for_round(2)
    states: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()
    thread = threading.Thread(target=_watch_health, args=(command.address, states), daemon=True)
    thread.start()
    assert states.get(timeout=20)[1] == health_pb2.HealthCheckResponse.SERVING
    asked, before = time.monotonic(), command.rounds()
    process.send_signal(signal.SIGTERM)
    assert states.get(timeout=20)[1] == health_pb2.HealthCheckResponse.NOT_SERVING
    assert process.wait(20) == 0
    print(f"drained in {time.monotonic() - asked:.2f} s")
    assert command.rounds() <= before + 2
    with RunStore(command.folder / "runs") as store:
        assert store.runs(limit=1)[0].status == "interrupted"
    _finish(command, command.start("--resume", "last"))


def _watch_health(address: str, states: queue.SimpleQueue[tuple[float, int]]) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            for answer in stub.Watch(health_pb2.HealthCheckRequest(service="turnout.v1.Fleet")):
                states.put((time.monotonic(), answer.status))
        except grpc.RpcError:
            return


def _finish(command: Command, process: subprocess.Popen[bytes]) -> None:
    assert process.wait(60) == 0
    with RunStore(command.folder / "runs") as store:
        run = store.runs(limit=1)[0]
    assert (run.status, run.model_sha256) == ("finished", twin(8))
