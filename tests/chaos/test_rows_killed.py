"""Per-client vectors in a file of rows: killed at any step, every checkpoint's rows are as they were."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import pytest
from chaos_faults import operations
from chaos_harness import KILL, NAME, SYNC, TEAR, WRITE, Fault, Server, few_of_many, with_shim, zeros

from turnout.server.recorder import model_sha256
from turnout.strategies import FedVARP

CLIENTS, SIZE, BEGUN, ROUNDS = 7, 300, 3, 5


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(("action", "kinds"), [(KILL, WRITE | SYNC | NAME), (TEAR, WRITE)])
def test_killed_at_every_step_of_rows_and_checkpoints(tmp_path: Path, action: int, kinds: int) -> None:
    """The run goes on after round 3; in round 5 slots of rows that were replaced come into use again."""
    log, store = tmp_path / "steps", tmp_path / "runs"
    settings = {"task": "local", "clients": CLIENTS, "size": SIZE, "memory": "mmap", "rounds": ROUNDS}
    first = Server(store, **settings)
    first.start(rounds=BEGUN)
    assert first.wait() == 0, first.life.lines
    first.close()
    base = store.rename(tmp_path / "base")
    (checkpoints,) = base.glob("*/checkpoints")
    below = store / checkpoints.relative_to(base)
    server = Server(store, forked=True, environment=with_shim(below, log=log), **settings)
    expected, ends = _undisturbed(), Counter[int]()
    try:
        for at in itertools.count(1):
            shutil.copytree(base, store)
            server.start(fault=Fault(at, action, kinds))
            code = server.wait()
            ends[code] += 1
            if code != 0:
                server.start()
            assert server.finish() == expected, f"step {at}: {server.life.lines}"
            shutil.rmtree(store)
            if code == 0:
                break
        hit = operations(log)
        print(f"steps killed {at - 1}: {dict(hit)}")
        assert hit["pwrite64"] >= 4 * (ROUNDS - BEGUN)  # Four rows a round.
        assert set(ends) == {0, -9}
    finally:
        server.close()


def _undisturbed() -> str:
    result = FedVARP(memory="ram").start(few_of_many(CLIENTS), zeros(SIZE), num_rounds=ROUNDS)
    return model_sha256(result.arrays)
