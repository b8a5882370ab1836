"""Connections to new SQLite files, opened by several processes in the same moment."""

from __future__ import annotations

import sqlite3
from multiprocessing.synchronize import Barrier
from pathlib import Path

from turnout.server import database


def open_together(folder: Path, files: int, barrier: Barrier) -> None:
    try:
        for number in range(files):
            barrier.wait(30)
            connection = sqlite3.connect(folder / f"{number}.sqlite")
            database._configure_sqlite(connection, None)
            connection.execute("CREATE TABLE IF NOT EXISTS t (a)")
            connection.close()
    except BaseException:
        barrier.abort()
        raise
