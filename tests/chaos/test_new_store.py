"""A new store that several processes open in the same moment."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from chaos_openers import open_together


def test_a_new_store_is_opened_by_several_at_once(tmp_path: Path) -> None:
    """SQLite changes to its write-ahead log without waiting for others, who are then told it is locked."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    openers = [spawn.Process(target=open_together, args=(tmp_path, 200, barrier)) for _ in range(3)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join(60)
    assert [opener.exitcode for opener in openers] == [0, 0, 0]
