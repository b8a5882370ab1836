"""Real server and node processes that are killed, starved and lied to, and the twin that judges them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.server.ledger import check_ledger
from turnout.server.ledger_replay import Replay
from turnout.server.recorder import model_sha256
from turnout.server.run_directory import RunDirectory
from turnout.server.store import RunStore
from turnout.simulation import LocalGrid, Sampled
from turnout.strategies import Scaffold
from turnout.wire import as_array, view

HERE = Path(__file__).parent
NODE = HERE.parent / "fleet" / "scaffold_node.py"
SERVER = HERE / "chaos_server.py"
SHIM_SOURCE = HERE / "fault_shim.c"
CLIENTS, SIZE = 8, 20_000
HOSTS = ("0-2", "3-5", "6-7")

WRITE, SYNC, NAME = 1, 2, 4
KILL, FAIL, FAIL_ON, TEAR = 0, 1, 2, 3


@functools.cache
def build_shim() -> Path | None:
    """Return the preloaded library, built from its source; None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    target = Path(tempfile.gettempdir()) / f"turnout-fault-shim-{os.getuid()}-{_digest(SHIM_SOURCE)}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(partial), str(SHIM_SOURCE)]
        subprocess.run(command, check=True, timeout=60)
        partial.replace(target)
    return target


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def free_port() -> int:
    """Return a port that no outgoing connection gets by chance, as nodes that try again and again would."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


def zeros(size: int = SIZE) -> ArrayRecord:
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(size, np.float32))
    return arrays


def undisturbed(clients: int = CLIENTS) -> LocalGrid:
    """Return the same clients in this process."""
    spec = importlib.util.spec_from_file_location("scaffold_node", NODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return LocalGrid(module.app(0.0), clients)


def few_of_many(clients: int) -> LocalGrid:
    """Return stateless clients in this process, of which four take part in a round."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        x = view(message.content["arrays"]["w"])
        noise = np.random.default_rng([client, int(message.content["config"]["server-round"])])
        y = x + noise.standard_normal(x.shape).astype(x.dtype)
        metrics = MetricRecord({"num-examples": client + 1, "client-id": client})
        content = RecordDict({"arrays": ArrayRecord({"w": as_array(y)}), "metrics": metrics})
        return Message(content, reply_to=message)

    return LocalGrid(made, clients, participation=Sampled(clients, 4, seed=3))


@functools.cache
def twin(rounds: int, *, clients: int = CLIENTS, size: int = SIZE) -> str:
    """Return the model's hash after an undisturbed run in this process."""
    strategy = Scaffold(num_clients=clients)
    return model_sha256(strategy.start(undisturbed(clients), zeros(size), num_rounds=rounds).arrays)


def until(condition: Callable[[], object], seconds: float = 60, *, what: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what()}"
        time.sleep(0.002)


@dataclass
class Fault:
    """What happens at the ``at``-th durable step of the given kinds, counted from the process's start."""

    at: int
    action: int = KILL
    kinds: int = WRITE | SYNC | NAME
    errno: int = 0

    def document(self) -> dict[str, int]:
        return {"kinds": self.kinds, "at": self.at, "action": self.action, "errno": self.errno}


@dataclass
class Life:
    """One server process from its start to its end: what it said, and when."""

    started: float
    lines: list[dict[str, Any]] = field(default_factory=list)
    ended: float | None = None
    code: int | None = None

    def said(self, key: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if key in line), None)

    @property
    def committed(self) -> int:
        return max((line["committed"] for line in self.lines if "committed" in line), default=0)

    def seconds_to(self, key: str) -> float:
        line = self.said(key)
        assert line is not None, f"never {key}: {self.lines}"
        return float(line["at"]) - self.started


class Server:
    """A server that dies and is started again; ``forked`` starts cost no imports (see chaos_server.py)."""

    def __init__(
        self,
        store: Path,
        *,
        forked: bool = False,
        environment: Mapping[str, str] | None = None,
        prefix: list[str] | None = None,
        **config: Any,
    ) -> None:
        self.store = store
        self.config = {"store": str(store), "clients": CLIENTS, "size": SIZE, "port": free_port(), **config}
        self.lives: list[Life] = []
        self._environment = {**os.environ, **(environment or {})}
        self._prefix = prefix or []
        self._forked = forked
        self._fork: subprocess.Popen[str] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []

    @property
    def life(self) -> Life:
        """The newest process."""
        return self.lives[-1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.config['port']}"

    @property
    def pid(self) -> int:
        until(lambda: self.life.lines, what=lambda: "no sign of life")
        return int(self.life.lines[0]["pid"])

    def start(self, *, fault: Fault | None = None, **changes: Any) -> Life:
        config = {**self.config, **changes, "fault": fault.document() if fault is not None else None}
        self.lives.append(Life(time.monotonic()))
        if self._forked:
            if self._fork is None:
                self._fork = self._spawn()
            assert self._fork.stdin is not None
            self._fork.stdin.write(json.dumps(config) + "\n")
            self._fork.stdin.flush()
        else:
            self._process = self._spawn(json.dumps(config))
        return self.life

    def _spawn(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*self._prefix, sys.executable, str(SERVER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        reader = threading.Thread(target=self._read, args=(process, self.life), daemon=True)
        reader.start()
        self._readers.append(reader)
        return process

    def _read(self, process: subprocess.Popen[str], life: Life) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            values = json.loads(line)
            if self._forked:
                life = self.life
            if "exited" in values:
                self._end(life, values["exited"])
            else:
                life.lines.append(values)
        if not self._forked:
            self._end(life, process.wait())

    @staticmethod
    def _end(life: Life, code: int) -> None:
        life.code, life.ended = code, time.monotonic()

    def wait_for(self, key: str, seconds: float = 60) -> dict[str, Any]:
        """Return the line with ``key`` of the newest process; fails when it ends without."""
        life = self.life
        until(lambda: life.said(key) or life.code is not None, seconds, what=lambda: life.lines[-3:])
        line = life.said(key)
        assert line is not None, f"ended with {life.code} before {key!r}: {life.lines[-3:]}"
        return line

    def wait(self, seconds: float = 60) -> int:
        """Return how the newest process ended."""
        life = self.life
        until(lambda: life.code is not None, seconds, what=lambda: life.lines[-3:])
        assert life.code is not None
        return life.code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        if self.lives and self.life.code is None:
            self.kill()
        if self._fork is not None and self._fork.stdin is not None:
            self._fork.stdin.close()
            self._fork.wait(10)
        for reader in self._readers:
            reader.join(10)

    # What is on its disk.

    def rounds(self) -> list[int]:
        """Return the committed rounds as the store has them."""
        with RunStore(self.store, create=False) as store:
            runs = store.runs(limit=1)
            return [row.round for row in store.rounds(runs[0].id)] if runs else []

    def directory(self) -> RunDirectory:
        with RunStore(self.store, create=False) as store:
            return RunDirectory(store.directory_of(store.runs(limit=1)[0]))

    def status(self) -> str:
        with RunStore(self.store, create=False) as store:
            return store.runs(limit=1)[0].status

    def ledger(self) -> list[str]:
        """Return what is wrong with the ledger, every round computed again from the replies it lists."""
        clients, size = int(self.config["clients"]), int(self.config["size"])
        strategy, grid = Scaffold(num_clients=clients), undisturbed(clients)
        replay = Replay(strategy=strategy, grid=grid, arrays=zeros(size))
        told = acknowledged(self.store.parent)
        with RunStore(self.store, create=False) as store:
            return check_ledger(store, store.runs(limit=1)[0].id, replay=replay, acknowledged=told)

    def finish(self, seconds: float = 120) -> str:
        """Let the newest process run to its end; return the model's hash."""
        model = str(self.wait_for("finished", seconds)["finished"])
        assert self.wait() == 0
        return model


def acknowledged(folder: Path) -> list[tuple[int, int]]:
    """Return the (client, round) pairs of which nodes were told that the reply counts."""
    lines = [
        line for file in folder.glob("state-*/acknowledged.txt") for line in file.read_text().splitlines()
    ]
    return [(int(client), int(number)) for client, number in (line.split() for line in lines)]


class Fleet:
    """Node processes that stay up while their server does not."""

    def __init__(self, folder: Path, address: str, *, pause: float = 0.005) -> None:
        self._folder, self._address, self._pause = folder, address, pause
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, clients: str, *, environment: Mapping[str, str] | None = None, prefix: list[str] | None = None
    ) -> subprocess.Popen[bytes]:
        name = f"n{clients.replace('-', 'to')}"
        command = [*(prefix or []), sys.executable, str(NODE), self._address, clients, name]
        state = self._folder / f"state-{name}"
        process = subprocess.Popen(
            [*command, str(state), str(self._pause)], env={**os.environ, **(environment or {})}
        )
        self.nodes[clients] = process
        return process

    def start_all(self, environment: Mapping[str, str] | None = None) -> Fleet:
        for clients in HOSTS:
            self.start(clients, environment=environment)
        return self

    def close(self) -> None:
        for process in self.nodes.values():
            process.kill()
        for process in self.nodes.values():
            process.wait(10)


@contextlib.contextmanager
def federation(
    folder: Path, *, rounds: int, pause: float = 0.005, nodes: bool = True, **server: Any
) -> Iterator[tuple[Server, Fleet]]:
    """A server (not started yet) and its nodes, ended together."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    made = Server(folder / "runs", rounds=rounds, **server)
    fleet = Fleet(folder, made.address, pause=pause)
    try:
        yield made, fleet.start_all() if nodes else fleet
    finally:
        made.close()
        fleet.close()


def with_shim(root: Path, *, log: Path | None = None, clock: Path | None = None) -> dict[str, str]:
    """Return the environment that preloads the shim for files below ``root``."""
    shim = build_shim()
    assert shim is not None
    environment = {"LD_PRELOAD": str(shim), "FAULT_ROOT": str(root.resolve())}
    if log is not None:
        environment["FAULT_LOG"] = str(log)
    if clock is not None:
        environment["FAULT_CLOCK"] = str(clock)
    return environment


def set_clock(file: Path, seconds: int) -> None:
    """Shift the wall clock of the processes that have ``file`` as FAULT_CLOCK."""
    with file.open("r+b" if file.exists() else "wb") as clock:
        clock.write(struct.pack("q", seconds))


def half_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]
