"""Per-client vectors in a file of rows: killed at any step of a round, every checkpoint's rows are as they were."""

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

CLIENTS, SIZE, ROUNDS = 7, 300, 5


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    ("memory", "action", "kinds"),
    [("mmap", KILL, WRITE | SYNC | NAME), ("mmap", TEAR, WRITE), ("fp16", KILL, WRITE)],
)
def test_killed_before_every_step_the_rows_stay(tmp_path: Path, memory: str, action: int, kinds: int) -> None:
    """Begun after round 3, when the slots of rows that were replaced come into use again."""
    log, base = tmp_path / "steps", tmp_path / "base"
    server = Server(
        base, forked=True, environment=with_shim(tmp_path, log=log), task="local", clients=CLIENTS, size=SIZE,
        memory=memory, rounds=ROUNDS,
    )  # fmt: skip
    try:
        server.start(rounds=3)
        assert server.wait() == 0, server.life.lines
        expected = _undisturbed("fp16" if memory == "fp16" else "ram")
        ended: Counter[int] = Counter()
        for at in itertools.count(1):
            server.store = tmp_path / f"runs-{at}"
            shutil.copytree(base, server.store)
            server.start(store=str(server.store), fault=Fault(at, action, kinds))
            code = server.wait()
            ended[code] += 1
            if code != 0:
                server.start(store=str(server.store))
            assert server.finish() == expected, f"step {at}: {server.life.lines}"
            shutil.rmtree(server.store)
            if code == 0:
                break
        hit = operations(log)
        print(f"steps killed {at - 1}: {dict(hit)}")
        # Two rounds of four rows each, written to slots of their own.
        assert hit["pwrite64"] >= 8
        assert set(ended) == {0, -9}
    finally:
        server.close()


def _undisturbed(memory: str) -> str:
    result = FedVARP(memory=memory).start(few_of_many(CLIENTS), zeros(SIZE), num_rounds=ROUNDS)
    return model_sha256(result.arrays)
