"""The engine of the store, its version, and who owns the SQLite file.

Alembic is imported only when there is something to migrate: it costs more than all the rest.
SQLite runs in WAL mode with a busy timeout, so the gunicorn workers and the key command share it.
A migration is one transaction on both databases, and one at a time: SQLite's write lock (BEGIN
IMMEDIATE), PostgreSQL's advisory lock. A start that is killed in it leaves the old version.
"""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine, make_url

from vmcell_api.store import template_tables  # noqa: F401  # its tables are part of the metadata
from vmcell_api.store.tables import SCHEMA_VERSION
from vmcell_protos.errors import HostError

BUSY_TIMEOUT_MS = 5000
# Others may be migrating; on a slow disk that takes a while.
MIGRATION_TIMEOUT_MS = 60_000
# Any number will do, as long as all of us take the same.
MIGRATION_LOCK = 0x766D63656C6C
CONNECT_TIMEOUT_S = 5
POOL_SIZE, POOL_OVERFLOW = 5, 60
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
        parsed = _with_driver(url)
        is_remote = parsed.drivername.startswith("postgresql")
        engine = sa.create_engine(
            parsed,
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S} if is_remote else {},
            # A server that was restarted is met here, not in the middle of a question.
            pool_pre_ping=True,
            hide_parameters=True,
            pool_size=POOL_SIZE,
            max_overflow=POOL_OVERFLOW,
        )
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


def _with_driver(url: str) -> URL:
    """The URL with psycopg 3 for PostgreSQL, unless it names a driver; `postgres://` works too."""
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def migrate(url: str, *, owner_uid: int | None = None) -> None:
    """Brings the store to the newest version; makes it first where it is a missing SQLite file.

    `owner_uid` gets the SQLite file, and its folder if that is made here, when we are root.
    Raises HostError.
    """
    engine = open_engine(url)
    try:
        path = _sqlite_path(engine.url)
        if path:
            _make_file(path, owner_uid if os.geteuid() == 0 else None)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _leave_transactions_to_us)
            sa.event.listen(engine, "begin", _take_sqlite)
        try:
            with engine.begin() as connection:
                if engine.dialect.name == "postgresql":
                    lock = sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)
                    connection.execute(sa.select(lock))
                if _version(connection) != SCHEMA_VERSION:
                    _upgrade(connection)
        finally:
            engine.dispose()
    except (OSError, sa.exc.SQLAlchemyError) as error:
        raise HostError(
            f"cannot bring the store {_shown(url)} up to date: {words_of(error)}; run as root or as"
            " the API's user, and see that database_url names a store that is there"
        ) from error


def _leave_transactions_to_us(connection, _) -> None:  # type: ignore[no-untyped-def]  # DB-API, untyped
    """sqlite3 would begin at the first change of a row, after the changes of the schema."""
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={MIGRATION_TIMEOUT_MS}")


def _take_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


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
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "vmcell_api.store:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise HostError(
            f"the store has version {_version(connection)}, which this program does not know; "
            "run the vmcell that made it, or a newer one"
        ) from error


def _version(connection: sa.Connection) -> str | None:
    """What Alembic wrote into the store, None when it never did."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


def check_version(engine: Engine) -> None:
    """Raises HostError unless the store has the version that this code wants."""
    try:
        with engine.connect() as connection:
            found = _version(connection)
    except sa.exc.SQLAlchemyError as error:
        raise HostError(f"cannot open the store: {words_of(error)}") from error
    if found != SCHEMA_VERSION:
        raise HostError(
            f"the store has version {found}, this program wants {SCHEMA_VERSION}; "
            "run: vmcell migrate"
        )


def words_of(error: Exception) -> str:
    """The database's own words: no statement, no second line, where PostgreSQL quotes values."""
    return (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]


def _sqlite_path(url: URL) -> Path | None:
    if not url.drivername.startswith("sqlite") or not url.database or url.database == ":memory:":
        return None
    return Path(url.database)


def _shown(url: str) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)
