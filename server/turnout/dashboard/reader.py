"""The dashboard's own way into the run store: connections that cannot write, and what is remembered of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from turnout.dashboard.memo import Memo
from turnout.server.database import open_reader, sqlite_path, store_url
from turnout.server.errors import StoreError
from turnout.server.schema import SCHEMA_REVISION

T = TypeVar("T")

_REMEMBERED: Final = 4_096
_SPLIT_ROUNDS: Final = 1_000


class StoreReader:
    """Reads the store at ``location`` (a URL, an SQLite file or a directory); never writes it.

    ``memo`` keeps results by key; keys contain what the result depends on, such as the last round.
    Raises `StoreError` when there is no store, or one of another version.
    """

    def __init__(self, location: str | Path) -> None:
        self.url = store_url(location)
        self.path = sqlite_path(self.url)
        self._engine = open_reader(self.url)
        self._file = self._identity()
        self.memo = Memo(_REMEMBERED)
        self.on_replaced: Callable[[], None] = lambda: None
        self._watching = threading.Lock()
        self._watch: tuple[object, Any] | None = None

    @property
    def name(self) -> str:
        """The kind of store, and its file's or database's name: no path, no host, no password."""
        name = self.path.name if self.path is not None else self.url.database or ""
        return f"{self.url.get_backend_name()}: {name}"

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Give a connection with one read transaction. Raises `StoreError` when the store is gone."""
        self._follow()
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise StoreError(
                    f"run store ({self.name}) cannot be read: {str(error.orig).strip()}."
                ) from error
            raise

    def check(self) -> None:
        """Raise `StoreError` when the store cannot be read now, or has another version by now."""
        try:
            with self.connect() as connection:
                revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        except SQLAlchemyError as error:
            raise StoreError(f"run store ({self.name}) cannot be read.") from error
        if revision != SCHEMA_REVISION:
            raise StoreError(
                f"run store ({self.name}) has schema {revision!r} by now; start the dashboard again."
            )

    def in_halves(
        self,
        connection: Connection,
        after: int,
        last: int,
        read: Callable[[Connection, int, int], list[T]],
    ) -> list[T]:
        """Return what ``read`` finds in the rounds after ``after`` to ``last``.

        Of many rounds one half is read on a thread of its own: SQLite lets go of Python while it works.
        """
        if last - after < _SPLIT_ROUNDS:
            return read(connection, after, last)
        middle = (after + last) // 2

        def second_half() -> list[T]:
            with self.connect() as other:
                return read(other, middle, last)

        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(second_half)
            return read(connection, after, middle) + rest.result()

    def data_version(self) -> tuple[object, int]:
        """Return what differs after every commit to the SQLite file; asked of one connection, kept for it."""
        self._follow()
        with self._watching:
            if self._watch is None or self._watch[0] != self._file:
                self._close_watch()
                self._watch = self._file, self._engine.raw_connection()
            cursor = self._watch[1].cursor()
            try:
                version: int = cursor.execute("PRAGMA data_version").fetchone()[0]
            finally:
                cursor.close()
            return self._file, version

    def forget_watch(self) -> None:
        """Give back the connection that `data_version` keeps."""
        with self._watching:
            self._close_watch()

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch[1].close()
            self._watch = None

    def directory(self, stored: str) -> Path:
        """Return the run directory that is written as ``stored`` in a run's row."""
        return Path(stored) if self.path is None else self.path.resolve().parent / stored

    def close(self) -> None:
        """Release the connections."""
        self.forget_watch()
        self._engine.dispose()

    def _identity(self) -> tuple[int, int] | None:
        if self.path is None:
            return None
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise StoreError(f"run store ({self.name}) is gone: {error.strerror or error}.") from error
        return found.st_dev, found.st_ino

    def _follow(self) -> None:
        """Leave a file that was replaced: open connections would go on reading the old one."""
        found = self._identity()
        if found != self._file:
            self._engine.dispose()
            self.memo.clear()
            self.on_replaced()
            self._file = found
