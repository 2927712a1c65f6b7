"""Migrations, from nothing and from every released schema with rows in it, on both databases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from vmcell_api.store import database
from vmcell_api.store.api_keys import ApiKeys
from vmcell_api.store.database import check_version, migrate, open_engine
from vmcell_api.store.records import Store
from vmcell_api.store.tables import SCHEMA_VERSION, Base
from vmcell_api.store.teams import Teams
from vmcell_protos.errors import HostError

SCHEMAS = Path(__file__).with_name("released_schemas")
RELEASED = sorted(path.stem for path in SCHEMAS.glob("*.sql"))
TEAM_ONE = "0b5e0a3e-0000-4000-8000-000000000001"


def _script() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", "vmcell_api.store:migrations")
    return ScriptDirectory.from_config(config)


def _make_old_store(url: str, version: str) -> None:
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(exist_ok=True)
    engine = open_engine(url)
    text = "".join(
        line
        for line in (SCHEMAS / f"{version}.sql").read_text().splitlines(keepends=True)
        if not line.startswith("--")
    )
    with engine.begin() as connection:
        for statement in text.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine.dispose()


def _assert_tables_are_right(url: str) -> None:
    engine = open_engine(url)
    check_version(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_the_versions_are_one_line_and_those_released_are_of_it() -> None:
    """A release adds tests/api/released_schemas/N.sql: its tables, as text, with rows in them."""
    versions = [script.revision for script in _script().walk_revisions()]
    assert versions == sorted(versions, reverse=True)
    assert _script().get_current_head() == SCHEMA_VERSION
    assert "0001" in RELEASED
    assert {*RELEASED} <= set(versions)


def test_from_nothing(empty_url: str) -> None:
    migrate(empty_url)
    _assert_tables_are_right(empty_url)
    migrate(empty_url)
    _assert_tables_are_right(empty_url)


@pytest.mark.parametrize("version", RELEASED)
def test_forward_with_rows(empty_url: str, version: str) -> None:
    _make_old_store(empty_url, version)
    migrate(empty_url)
    _assert_tables_are_right(empty_url)
    store = Store(open_engine(empty_url))
    rows = store.sandboxes(team_id=TEAM_ONE)
    assert rows["i0000000000000000001"].metadata == {"who": "me & you", "é": "ü"}
    assert rows["i0000000000000000001"].access_token == "token-of-one"
    mine = store.template("mine")
    assert mine is not None
    assert mine.memory_mib == 1024
    limits = {row.team.name: row.team.sandbox_limit for row in Teams(store.engine).list()}
    assert limits == {"one": 100, "two": 7}
    keys = ApiKeys(store.engine)
    assert len({key.key_id for key in keys.list()}) == 3
    old = keys.find("1d6f5a0c5b8f2f1f" + "0" * 46 + "a1")
    assert old is not None
    assert (old.team.name, old.scopes, old.state(1 << 60)) == ("one", ("*",), "active")
    before = keys.list()
    migrate(empty_url)
    assert keys.list() == before
    store.close()


@pytest.mark.parametrize("old", [None, "0001"])
def test_at_once_from_several_processes(empty_url: str, old: str | None) -> None:
    if old:
        _make_old_store(empty_url, old)
    code = f"from vmcell_api.store.database import migrate; migrate({empty_url!r})"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    words = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], words
    _assert_tables_are_right(empty_url)


def test_what_breaks_off_leaves_the_old_version(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_old_store(empty_url, "0001")

    def upgrade_and_break(connection: sa.Connection) -> None:
        upgrade(connection)
        raise OSError("the power went")

    upgrade = database._upgrade
    monkeypatch.setattr(database, "_upgrade", upgrade_and_break)
    with pytest.raises(HostError, match="the power went"):
        migrate(empty_url)
    engine = open_engine(empty_url)
    inspector = sa.inspect(engine)
    assert not inspector.has_table("audit")
    assert [column["name"] for column in inspector.get_columns("api_keys")] == [
        "hash",
        "team_id",
        "created_at_unix_ms",
    ]
    engine.dispose()
    monkeypatch.undo()
    migrate(empty_url)
    _assert_tables_are_right(empty_url)


def test_a_store_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"Not a directory.*; run as root .* database_url"):
        migrate(f"sqlite:///{tmp_path}/file/api.sqlite")


def test_a_store_of_a_newer_program_is_left_alone(empty_url: str) -> None:
    migrate(empty_url)
    engine = open_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(HostError, match="9999"):
        check_version(engine)
    with pytest.raises(HostError, match="9999, which this program does not know"):
        migrate(empty_url)
    engine.dispose()


def test_the_migrations_can_be_taken_back(empty_url: str) -> None:
    from alembic import command

    migrate(empty_url)
    engine = open_engine(empty_url)
    config = Config()
    config.set_main_option("script_location", "vmcell_api.store:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()
