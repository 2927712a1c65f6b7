"""A PostgreSQL of the tests' own: Debian's package, a temporary folder, a unix socket, no root."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

PATIENCE_S = 60
SETTINGS = {"listen_addresses": "", "fsync": "off", "max_connections": "150"}


class PrivatePostgres:
    """A running server; `database()` makes an empty database of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def database(self) -> str:
        """The URL of a fresh database, as an operator writes it."""
        name = f"t{next(self._numbers)}"
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://vmcell@/{name}?host={self._folder}"

    def connect(self, name: str) -> psycopg.Connection:
        """A connection that commits each statement."""
        return psycopg.connect(
            host=str(self._folder), user="vmcell", dbname=name, autocommit=True, connect_timeout=5
        )


def _program(name: str) -> str:
    """Debian keeps the server's programs out of PATH, by version."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=_version)
    found = str(versions[-1]) if versions else shutil.which(name)
    assert found, f"{name} is missing: tools/install-packages test"
    return found


def _version(path: Path) -> int:
    return int(path.parts[4]) if path.parts[4].isdigit() else 0


@contextlib.contextmanager
def private_postgres() -> Iterator[PrivatePostgres]:
    """A server that is gone at the end, with its data; run by nobody, as it refuses to be root."""
    with tempfile.TemporaryDirectory(prefix="vmpg", dir="/tmp") as name:
        folder = Path(name)
        user: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        data = folder / "data"
        initdb = [_program("initdb"), "-D", str(data), "-U", "vmcell", "-A", "trust", "-N"]
        initdb += ["--encoding=UTF8", "--locale=C"]
        subprocess.run(
            initdb, check=True, capture_output=True, timeout=PATIENCE_S, cwd=folder, **user
        )
        options = ["-k", str(folder)]
        for setting, value in SETTINGS.items():
            options += ["-c", f"{setting}={value}"]
        # By pg_ctl, so that the server is nobody's child: other tests look for children of theirs.
        control = [_program("pg_ctl"), "-D", str(data), "-w", "-t", str(PATIENCE_S)]
        log = folder / "log"
        start = [*control, "-l", str(log), "-o", shlex.join(options), "start"]
        try:
            subprocess.run(
                start,
                check=True,
                stdout=subprocess.DEVNULL,
                timeout=2 * PATIENCE_S,
                cwd=folder,
                **user,
            )
            yield PrivatePostgres(folder)
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(
                stop, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S, cwd=folder, **user
            )
