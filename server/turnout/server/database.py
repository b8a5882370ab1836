"""Connections of the run store: where it lives, how it is opened, which schema it has.

SQLite runs in WAL mode with ``synchronous=FULL``: a committed round survives a power cut. Migrations ship
inside the package and run on opening; an SQLite file is copied aside before it is changed.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from turnout.server.errors import StoreError
from turnout.server.schema import SCHEMA_REVISION
from turnout.wire.checkpoint import sync_directory

STORE_FILE: Final = "turnout.sqlite"
MIGRATIONS: Final = Path(__file__).parent / "migrations"

_WRITE_OPTION: Final = "turnout_write"
_BUSY_MILLISECONDS: Final = 30_000
_DISK_ERRORS: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
_ADVISORY_LOCK: Final = 7_488_766_001  # Any fixed number: migrations of one PostgreSQL database take turns.


def store_url(location: str | Path) -> URL:
    """Return the database URL that ``location`` means: a URL, an SQLite file, or a directory that holds one.

    Raises `StoreError` for a URL that cannot be read.
    """
    if isinstance(location, str) and "://" in location:
        try:
            url = make_url(location)
        except (ArgumentError, ValueError) as error:
            raise StoreError(f"run store URL {location!r} cannot be read: {error}.") from error
        if url.drivername in ("postgres", "postgresql"):
            return url.set(drivername="postgresql+psycopg")
        return url
    path = Path(location)
    if path.suffix not in (".sqlite", ".sqlite3", ".db"):
        path = path / STORE_FILE
    return URL.create("sqlite", database=str(path))


def sqlite_path(url: URL) -> Path | None:
    """Return the file of an SQLite URL; None for other databases and for SQLite in memory."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


def open_engine(url: URL, *, create: bool) -> Engine:
    """Return an engine on a database that has the current schema.

    ``create=False`` refuses to make a new SQLite file. Raises `StoreError` when the database cannot be
    reached, is not a run store, or was written by a newer version.
    """
    path = sqlite_path(url)
    if path is not None and not path.exists():
        if not create:
            raise StoreError(
                f"no run store at {path}. Start a run first (`turnout simulate FILE`), "
                "or name the right place with --store."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = _engine(url)
    shown = url.render_as_string(hide_password=True)
    try:
        _ensure_schema(engine, path, shown)
    except SQLAlchemyError as error:
        engine.dispose()
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreError(f"run store {shown} cannot be opened: {str(cause).strip()}.") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def open_reader(url: URL) -> Engine:
    """Return an engine that cannot write, on a database that has the current schema; it makes no file.

    Raises `StoreError` as `open_engine` does.
    """
    open_engine(url, create=False).dispose()
    path = sqlite_path(url)
    if path is None:
        return _engine(url).execution_options(postgresql_readonly=True)
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(address, uri=True, check_same_thread=False),
        poolclass=QueuePool,
        max_overflow=20,
    )
    event.listen(engine, "connect", _configure_reader)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def writer(engine: Engine) -> Engine:
    """Return a view of ``engine`` whose transactions take SQLite's write lock when they begin.

    A transaction that reads first and writes later could otherwise fail at once instead of waiting its turn.
    """
    return engine.execution_options(**{_WRITE_OPTION: True})


def _engine(url: URL) -> Engine:
    try:
        engine = create_engine(url, pool_pre_ping=url.get_backend_name() != "sqlite")
    except ModuleNotFoundError as error:
        hint = " Install it with: pip install 'turnout[postgres]'." if "postgresql" in url.drivername else ""
        raise StoreError(f"run store URL needs the driver {error.name!r}.{hint}") from error
    except NoSuchModuleError as error:
        raise StoreError(
            f"run store URL starts with {url.drivername!r}; use sqlite:///FILE or postgresql://..."
        ) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        event.listen(engine, "handle_error", _name_the_file)
    return engine


def _name_the_file(context: ExceptionContext) -> None:
    """Say which file SQLite could not write: it only says that the disk is full, or failed."""
    error = context.original_exception
    path = None if context.engine is None else sqlite_path(context.engine.url)
    if path is None or getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DISK_ERRORS:
        return
    free = shutil.disk_usage(path.parent).free
    raise StoreError(f"run store {path} cannot be written: {error} ({free} bytes are free).") from error


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Transactions are begun by _begin_sqlite, also around DDL.
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
    _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _configure_reader(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Transactions are begun by _begin_sqlite.
    connection.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
    connection.execute("PRAGMA query_only=ON")


def _write_ahead(cursor: sqlite3.Cursor) -> None:
    """Change to the write-ahead log; for this SQLite does not wait by itself while others open the file."""
    deadline = time.monotonic() + _BUSY_MILLISECONDS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _ensure_schema(engine: Engine, path: Path | None, shown: str) -> None:
    with engine.connect() as connection:
        revision = _revision(connection, shown)
    if revision == SCHEMA_REVISION:
        return
    if revision is not None:
        _check_known(revision, shown)
        if path is not None:
            _back_up(path, revision)
    with writer(engine).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        if _revision(connection, shown) != SCHEMA_REVISION:  # Another process may have been faster.
            _upgrade(connection)


def _revision(connection: Connection, shown: str) -> str | None:
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        if tables:
            raise StoreError(
                f"database {shown} holds other tables ({', '.join(sorted(tables)[:3])}) and no run store; "
                "name another file or database."
            )
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _check_known(revision: str, shown: str) -> None:
    from alembic.script import ScriptDirectory

    known = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]
    if revision not in known:
        raise StoreError(
            f"run store {shown} has schema {revision!r}, written by a newer Turnout (this one knows up to "
            f"{SCHEMA_REVISION!r}). It was left untouched: upgrade turnout, or use another store."
        )


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _back_up(path: Path, revision: str) -> Path:
    """Copy the SQLite file aside (a consistent copy, write-ahead log included) and return the copy's path."""
    target = path.with_name(f"{path.name}.schema-{revision}.backup")
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    source, copy = sqlite3.connect(path), sqlite3.connect(partial)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    sync_directory(target.parent)
    return target
