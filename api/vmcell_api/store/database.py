"""The engine of the store, its version, and who owns the SQLite file.

Alembic is imported only when there is something to migrate: it costs more than all the rest.
SQLite runs in WAL mode with a busy timeout, so the gunicorn workers and the key command share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine, make_url

from vmcell_api.store import template_tables  # noqa: F401  # its tables are part of the metadata
from vmcell_api.store.tables import SCHEMA_VERSION
from vmcell_protos.errors import HostError

BUSY_TIMEOUT_MS = 5000
_PRAGMAS = (
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}",
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
)


def open_engine(url: str) -> Engine:
    """An engine for `url`; nothing is connected yet. Raises HostError for a URL that is none."""
    try:
        # Parameters are tokens and hashes of keys; errors go into logs and answers.
        engine = sa.create_engine(url, pool_pre_ping=True, hide_parameters=True)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise HostError(
            f"database_url cannot be used: {error}; give one like sqlite:////path or postgresql://"
        ) from error
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection, _) -> None:  # type: ignore[no-untyped-def]  # DB-API, untyped
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def migrate(url: str, *, owner_uid: int | None = None) -> None:
    """Brings the store to the newest version; makes it first where it is a missing SQLite file.

    `owner_uid` gets the SQLite file, and its folder if that is made here, when we are root.
    Raises HostError.
    """
    path = _sqlite_path(make_url(url))
    try:
        if path:
            _make_file(path, owner_uid if os.geteuid() == 0 else None)
        engine = open_engine(url)
        try:
            with _one_at_a_time(path), engine.begin() as connection:
                if _version(connection) != SCHEMA_VERSION:
                    _upgrade(connection)
        finally:
            engine.dispose()
    except (OSError, sa.exc.SQLAlchemyError) as error:
        raise HostError(f"cannot bring the store {_shown(url)} up to date: {error}") from error


def _make_file(path: Path, owner_uid: int | None) -> None:
    """Makes the file and its folder unless they are there; a folder that was there stays as is."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, mode=0o700)
        if owner_uid is not None:
            os.chown(path.parent, owner_uid, owner_uid)
    path.touch(mode=0o600)
    # SQLite gives its side files the owner of the database file.
    if owner_uid is not None:
        os.chown(path, owner_uid, owner_uid)


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "vmcell_api.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _version(connection: sa.Connection) -> str | None:
    """What Alembic wrote into the store, None when it never did."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


@contextlib.contextmanager
def _one_at_a_time(path: Path | None) -> Iterator[None]:
    """Holds a lock on the SQLite file's folder: its schema changes are not transactional.

    Not on the file itself: closing a descriptor of it would drop SQLite's own locks.
    """
    if path is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def check_version(engine: Engine) -> None:
    """Raises HostError unless the store has the version that this code wants."""
    try:
        with engine.connect() as connection:
            found = _version(connection)
    except sa.exc.SQLAlchemyError as error:
        raise HostError(f"cannot open the store: {error}") from error
    if found != SCHEMA_VERSION:
        raise HostError(
            f"the store has version {found}, this program wants {SCHEMA_VERSION}; "
            "run `python -m vmcell_api.keys migrate`"
        )


def _sqlite_path(url: URL) -> Path | None:
    if not url.drivername.startswith("sqlite") or not url.database or url.database == ":memory:":
        return None
    return Path(url.database)


def _shown(url: str) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)
