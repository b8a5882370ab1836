"""What chaos tests share. Those marked ``alone`` judge by deadlines."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fleet")]

from chaos_harness import Server, build_shim, federation, twin  # noqa: E402 - found by the line above


@pytest.fixture(scope="session")
def seed() -> int:
    """Return the seed of all random faults; TURNOUT_SEED repeats a run that failed."""
    return int(os.environ.get("TURNOUT_SEED", "20261122"))


@pytest.fixture
def rng(seed: int, record_property: Callable[[str, object], None]) -> random.Random:
    record_property("seed", seed)
    print(f"seed {seed}: repeat with TURNOUT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def fault_log(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write what was done to a file, one JSON object per line; shown when the test fails."""
    with (tmp_path / "faults.jsonl").open("w") as file:

        def note(entry: dict[str, Any]) -> None:
            print(json.dumps(entry))
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield note


@pytest.fixture
def shim() -> None:
    """Skip where the fault shim cannot be built."""
    if build_shim() is None:
        pytest.skip("the fault shim needs gcc (or cc) on Linux")


@pytest.fixture
def judge() -> Callable[[Server, int, str], None]:
    """Return the verdict over a finished run: the undisturbed twin bit for bit, and the ledger check."""

    def check(server: Server, rounds: int, model: str) -> None:
        assert server.rounds() == list(range(1, rounds + 1))
        assert server.ledger() == []
        assert model == twin(rounds, clients=server.config["clients"], size=server.config["size"])
        assert server.status() == "finished"

    return check


@pytest.fixture
def chaos(tmp_path: Path) -> Callable[..., Any]:
    """Return the maker of a server with its nodes, below the test's folder."""
    return lambda **settings: federation(tmp_path, **settings)
