from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from turnout.wire import as_array

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from fleet_commands import EXPERIMENT, Command, Turnout  # noqa: E402 - found by the line above


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


class Spawned:
    """A node process of the tests."""

    def __init__(self, script: str, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def result(self, timeout: float = 20) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0
        return json.loads(out.splitlines()[-1])


Spawn = Callable[..., Spawned]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start node processes; what is left of them ends with the test."""
    yield from _spawner()


@pytest.fixture(scope="module")
def spawn_for_module() -> Iterator[Spawn]:
    yield from _spawner()


def _spawner() -> Iterator[Spawn]:
    started: list[Spawned] = []

    def start(script: str, *arguments: object) -> Spawned:
        started.append(Spawned(script, [str(argument) for argument in arguments]))
        return started[-1]

    yield start
    for node in started:
        if node.process.poll() is None:
            node.process.kill()
        node.process.communicate()


@pytest.fixture(scope="session")
def numpy_app() -> ModuleType:
    return _load("numpy_app")


@pytest.fixture(scope="session")
def raw_client() -> ModuleType:
    return _load("raw_client")


@pytest.fixture(scope="session")
def round_of() -> Any:
    """Return the class that runs a FedAvg round: ``round_of(server, clients, size, rounds=1)``."""
    return _load("hostile_round").Round


@pytest.fixture(scope="session")
def fuzzing() -> ModuleType:
    return _load("fuzzing")


@pytest.fixture(scope="session")
def initial() -> Callable[..., ArrayRecord]:
    """Return a maker of zero models of ``size`` float32 numbers in three tensors."""

    def make(size: int = 1000) -> ArrayRecord:
        vector = np.zeros(size, np.float32)
        cuts = [0, size // 4, size // 2, size]
        return ArrayRecord(
            {f"w{i}": as_array(vector[a:b]) for i, (a, b) in enumerate(itertools.pairwise(cuts))}
        )

    return make


@pytest.fixture(scope="session")
def digest() -> Callable[[Any], str]:
    """Return the hash of a strategy's model."""
    return lambda strategy: hashlib.sha256(np.ascontiguousarray(strategy.x).tobytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    return tmp_path


@pytest.fixture
def turnout(place: Path) -> Iterator[Turnout]:
    """Start commands in ``place``; what is left of them ends with the test."""
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        words = [str(argument) for argument in arguments]
        started.append(Command(place, f"{len(started)}-{words[0]}", words))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()
