"""A round costs what its participants cost: counted in bytecodes and bytes, not in seconds."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from strategy_table import ROWS, Row

from turnout.strategies import Reply, StreamingStrategy
from turnout.strategies.clients import ClientRegistry
from turnout.wire import save_checkpoint

FEW, MANY, COHORT, SIZE = 2_000, 100_000, 20, 8
every_strategy = pytest.mark.parametrize("row", ROWS, ids=str)


class Federation:
    """A strategy, ``clients`` registered clients, and rounds in which 20 of them take part."""

    def __init__(self, row: Row, clients: int, folder: Path) -> None:
        # Known probabilities are given for all, and a cohort is never everyone.
        changes: dict[str, Any] = {}
        if isinstance(row.options.get("participation"), dict):
            changes["participation"] = np.full(clients, 0.5)
        if row.name in ("dual-admm", "rerce-fed"):
            changes["clients_per_round"] = COHORT
        self.strategy: StreamingStrategy = row.strategy(**changes)
        self.strategy.prepare(np.zeros(SIZE, np.float32))
        self.clients, self.folder = clients, folder

    def round(self, server_round: int) -> None:
        """Everything that a round does, a checkpoint included."""
        strategy = self.strategy
        nodes = list(range(7 * server_round, self.clients, self.clients // COHORT))[:COHORT]
        strategy.begin_round(server_round, range(self.clients))
        for node, instruction in strategy.select(server_round, nodes).items():
            row = strategy.clients.identify(node, node, server_round)
            update = (
                np.random.default_rng([node % 100, server_round]).standard_normal(SIZE).astype(np.float32)
            )
            vectors = dict.fromkeys(instruction.extras, update)
            role = instruction.local_update
            metrics = {"momentum-square": 1.0}
            largest = float(np.abs(update).max())
            reply = Reply(row, update, 5, largest, role=role, vectors=vectors, metrics=metrics)
            strategy.accept(server_round, reply)
        strategy.end_round(server_round)
        strategy.diagnostics()
        strategy.memory_bytes()
        strategy.keep_rows(self.folder, "run")
        save_checkpoint(self.folder / "checkpoint", strategy.state_dict())


def bytecodes(action: Callable[[], None]) -> int:
    """Return how many instructions the interpreter executes in ``action``, loops of one line included."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def peak_bytes(action: Callable[[], None]) -> int:
    """Return the most memory that ``action`` had taken at a time."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@every_strategy
def test_a_round_does_not_grow_with_the_clients_that_stay_away(row: Row, tmp_path: Path) -> None:
    counted, peaks = [], []
    for clients in (FEW, MANY):
        folder = tmp_path / str(clients)
        folder.mkdir()
        federation = Federation(row, clients, folder)
        for server_round in (1, 2, 3):
            federation.round(server_round)
        counted.append(bytecodes(lambda federation=federation: federation.round(4)))  # type: ignore[misc]
        peaks.append(peak_bytes(lambda federation=federation: federation.round(5)))  # type: ignore[misc]
    few, many = counted
    assert few > 5_000
    # A tenth of an instruction for each further client: roles that are drawn differ a little.
    assert many - few < (MANY - FEW) / 10, "a Python loop over all clients"
    # A column or two while a checkpoint is packed; an object per client would take more.
    assert (peaks[1] - peaks[0]) / (MANY - FEW) < 32, "a Python object for every client"


def test_registering_everyone_is_not_a_loop_of_ours() -> None:
    registry = ClientRegistry()
    assert bytecodes(lambda: registry.register(range(MANY), 1) and None) < 5_000
    assert len(registry) == MANY
    assert peak_bytes(lambda: registry.register(range(MANY), 2) and None) < 10_000


def test_a_list_of_everyone_is_looked_through_once_if_it_cannot_change() -> None:
    registry, nodes = ClientRegistry(), tuple(range(MANY))
    assert registry.register(nodes, 1) == range(MANY)
    assert bytecodes(lambda: registry.register(nodes, 2) and None) < 200
    assert list(registry.register((*nodes, MANY), 3)) == [MANY]


def test_the_counters_see_a_loop() -> None:
    # What the tests above must be able to find.
    assert bytecodes(lambda: [None for _ in range(1000)] and None) > 3_000
    assert peak_bytes(lambda: [object() for _ in range(MANY)] and None) > 16 * MANY
