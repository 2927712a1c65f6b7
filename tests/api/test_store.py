"""The store on both databases: tenants, limits, and what happens when it is broken."""

from __future__ import annotations

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from private_postgres import PrivatePostgres

from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import SandboxRecord, Store
from vmcell_protos.errors import CallerError, HostError


def _url(folder: Path) -> str:
    return f"sqlite:///{folder}/store/api.sqlite"


@pytest.fixture
def url(empty_url: str) -> str:
    migrate(empty_url)
    return empty_url


def _record(name: str, team_id: str) -> SandboxRecord:
    return SandboxRecord(
        sandbox_id=name.ljust(20, "0"),
        team_id=team_id,
        template_id="base",
        access_token="t" + name,
        metadata={"é": "\n"},
        created_at_unix_ms=1 << 41,
    )


def test_an_error_of_the_database_tells_no_token(url: str) -> None:
    store = Store(open_engine(url))
    team = store.ensure_team("one")
    store.add_sandbox(_record("first", team.team_id), limit=9, live=())
    with pytest.raises(HostError) as caught:
        store.add_sandbox(_record("first", team.team_id), limit=9, live=())
    store.close()
    assert "tfirst" not in str(caught.value)
    assert "unique" in str(caught.value).lower()


def test_the_limit_holds_for_creates_at_once(url: str) -> None:
    store = Store(open_engine(url))
    team = store.ensure_team("one")
    others = [Store(open_engine(url)) for _ in range(2)]
    barrier = threading.Barrier(8)

    def add(number: int) -> bool:
        barrier.wait(10)
        try:
            record = _record(f"s{number}", team.team_id)
            others[number % 2].add_sandbox(record, limit=3, live=())
        except CallerError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(8))) == 3
    for each in (store, *others):
        each.close()


def test_nobody_else_reads_the_file(tmp_path: Path) -> None:
    migrate(_url(tmp_path))
    path = Path(_url(tmp_path).removeprefix("sqlite:///"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_was_there_keeps_its_owner_and_mode(tmp_path: Path) -> None:
    before = tmp_path.stat()
    migrate(f"sqlite:///{tmp_path}/api.sqlite", owner_uid=before.st_uid + 1)
    after = tmp_path.stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


def test_a_team_sees_its_own_rows_only(url: str) -> None:
    store = Store(open_engine(url))
    one, two = store.ensure_team("one").team_id, store.ensure_team("two").team_id
    record = _record("a", one)
    store.add_sandbox(record, limit=9, live=())
    assert store.sandbox(record.sandbox_id, team_id=one) == record
    assert store.sandbox(record.sandbox_id, team_id=two) is None
    assert store.sandboxes(team_id=two) == {}
    assert store.tokens() == {record.sandbox_id: "ta"}
    store.forget_sandboxes([record.sandbox_id])
    store.forget_sandboxes([record.sandbox_id])
    assert store.sandboxes(team_id=one) == {}
    store.close()


def test_the_limit_counts_what_lives_and_what_is_being_made(url: str) -> None:
    store = Store(open_engine(url))
    team_id = store.ensure_team("one").team_id
    store.add_sandbox(_record("a", team_id), limit=1, live=())
    with pytest.raises(CallerError, match="at most 1"):
        store.add_sandbox(_record("b", team_id), limit=1, live=())
    store.mark_built(_record("a", team_id).sandbox_id)
    store.add_sandbox(_record("b", team_id), limit=1, live=())
    store.close()


def test_the_templates_of_every_installation(url: str) -> None:
    store = Store(open_engine(url))
    for name in ("base", "small"):
        template = store.template(name)
        assert template is not None
        assert template.image == f"docker.io/vmcell/{name}:latest"
    assert store.template("other") is None
    store.close()


def test_writers_wait_for_each_other(url: str) -> None:
    store = Store(open_engine(url))
    team_id = store.ensure_team("one").team_id
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait(10)
        store.add_sandbox(_record(f"s{number}", team_id), limit=99, live=())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(store.sandboxes(team_id=team_id)) == 8
    store.close()


def test_a_broken_store_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "store" / "api.sqlite"
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(HostError, match="cannot bring the store"):
        migrate(_url(tmp_path))
    store = Store(open_engine(_url(tmp_path)))
    with pytest.raises(HostError, match="the store did not answer"):
        store.template("x")
    store.close()
    with pytest.raises(HostError, match="database_url"):
        open_engine("nonsense")


def test_templates_of_every_installation(url: str) -> None:
    store = Store(open_engine(url))
    interpreter = store.template("code-interpreter-v1")
    assert interpreter is not None
    assert interpreter.image == "docker.io/vmcell/code-interpreter-v1:latest"
    assert (interpreter.vcpus, interpreter.memory_mib) == (2, 1024)
    desktop = store.template("desktop")
    assert desktop is not None
    assert desktop.image == "docker.io/vmcell/desktop:latest"
    assert (desktop.vcpus, desktop.memory_mib) == (2, 2048)
    assert store.template("base") is not None
    store.close()


def test_a_postgresql_that_is_away_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    away = f"postgresql://vmcell:hunter2@/vmcell?host={tmp_path}"
    with pytest.raises(HostError, match="cannot bring the store postgresql") as caught:
        migrate(away)
    store = Store(open_engine(away))
    with pytest.raises(HostError, match="the store did not answer") as again:
        store.template("x")
    store.close()
    assert "hunter2" not in f"{caught.value}{again.value}"
    assert "\n" not in f"{caught.value}{again.value}"


def test_a_postgresql_that_was_restarted_is_found_again(postgres: PrivatePostgres) -> None:
    url = postgres.database()
    migrate(url)
    store = Store(open_engine(url))
    assert store.template("base")
    with postgres.connect("postgres") as connection:
        killed = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
            [url.partition("@/")[2].partition("?")[0]],
        ).fetchall()
    assert killed == [(True,)]
    assert store.template("base")
    store.close()
