"""Teams, keys and audit in the store, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from fake_node import FakeNode

from vmcell_api.identifiers import API_KEY, hash_api_key, new_api_key
from vmcell_api.node_client import NewSandbox
from vmcell_api.store.api_keys import ApiKeys
from vmcell_api.store.audit import PRUNE_EVERY, Audit, AuditEntry, AuditQuery
from vmcell_api.store.database import migrate, open_engine
from vmcell_api.store.records import SandboxRecord, Store, now_ms
from vmcell_api.store.tables import ApiKeyRow, AuditRow
from vmcell_api.store.teams import Teams
from vmcell_api.tenancy import (
    MAX_GRACE_S,
    PREFIX_LENGTH,
    create_key,
    parse_duration_s,
    remove_team,
    rotate_key,
)
from vmcell_protos.errors import CallerError


@pytest.fixture
def store(empty_url: str) -> Iterator[Store]:
    migrate(empty_url)
    opened = Store(open_engine(empty_url))
    yield opened
    opened.close()


def test_only_hash_and_prefix_of_a_key_are_kept(store: Store) -> None:
    key, record = create_key(store, store.ensure_team("one"), scopes=["*"], name="ci")
    assert API_KEY.fullmatch(key)
    keys = ApiKeys(store.engine)
    found = keys.find(hash_api_key(key))
    assert found == record
    assert (found.team.name, found.name, found.prefix) == ("one", "ci", key[:PREFIX_LENGTH])
    assert keys.find(hash_api_key(new_api_key())) is None
    with store.engine.connect() as connection:
        for table in ("teams", "api_keys", "audit"):
            for row in connection.exec_driver_sql(f"SELECT * FROM {table}"):
                assert key not in str(row)


def test_a_key_ends_by_its_time_and_by_revocation(store: Store) -> None:
    team = store.ensure_team("one")
    _, record = create_key(store, team, scopes=["sandboxes:read"], life_s=60)
    assert record.state(now_ms()) == "active"
    assert record.state(now_ms() + 60_001) == "expired"
    keys = ApiKeys(store.engine)
    revoked = keys.revoke(record.key_id)
    assert revoked.state(now_ms()) == "revoked"
    assert keys.revoke(record.key_id) == revoked, "again changes nothing"
    with pytest.raises(CallerError, match="not found"):
        keys.revoke("k0")
    for wrong in (0, -1, 1 << 40):
        with pytest.raises(CallerError, match="lives"):
            create_key(store, team, scopes=["*"], life_s=wrong)
    for wrong_name in ("x" * 65, "a\nb"):
        with pytest.raises(CallerError, match="name"):
            create_key(store, team, scopes=["*"], name=wrong_name)
    for scopes in (["sandboxes"], ["admin:read"], [], ["*", "x:read"]):
        with pytest.raises(CallerError, match="known are"):
            create_key(store, team, scopes=scopes)
    assert len(keys.list()) == 1


def test_rotation(store: Store) -> None:
    team = store.ensure_team("one")
    _, old = create_key(store, team, scopes=["sandboxes:*", "team:read"], name="ci", life_s=7200)
    fresh_key, fresh = rotate_key(store, old.key_id, grace_s=600)
    keys = ApiKeys(store.engine)
    assert keys.find(hash_api_key(fresh_key)) == fresh
    assert (fresh.scopes, fresh.name, fresh.team) == (old.scopes, old.name, old.team)
    assert fresh.expires_at_unix_ms == old.expires_at_unix_ms
    ending = keys.get(old.key_id)
    assert ending.state(now_ms()) == "active"
    assert ending.state(now_ms() + 600_001) == "expired"
    rotate_key(store, fresh.key_id, grace_s=0)
    assert keys.get(fresh.key_id).state(now_ms()) == "expired"
    with pytest.raises(CallerError, match="is expired"):
        rotate_key(store, fresh.key_id, grace_s=0)
    with pytest.raises(CallerError, match="not found"):
        rotate_key(store, "k0", grace_s=0)
    with pytest.raises(CallerError, match="seconds"):
        rotate_key(store, old.key_id, grace_s=MAX_GRACE_S + 1)
    assert len(keys.list(team.team_id)) == 3


def test_a_grace_never_prolongs_a_key(store: Store) -> None:
    _, old = create_key(store, store.ensure_team("one"), scopes=["*"], life_s=10)
    rotate_key(store, old.key_id, grace_s=3600)
    assert ApiKeys(store.engine).get(old.key_id).expires_at_unix_ms == old.expires_at_unix_ms


def test_the_last_use(store: Store) -> None:
    key, record = create_key(store, store.ensure_team("one"), scopes=["*"])
    assert record.last_used_at_unix_ms is None
    keys = ApiKeys(store.engine)
    keys.touch(record.key_id)
    used = keys.find(hash_api_key(key))
    assert used is not None
    assert abs((used.last_used_at_unix_ms or 0) - now_ms()) < 60_000


def test_teams_and_their_limits(store: Store) -> None:
    teams = Teams(store.engine)
    made = teams.create("b.team", {"sandbox_limit": 3, "max_timeout_s": 60})
    assert (made.sandbox_limit, made.max_timeout_s, made.requests_per_s) == (3, 60, None)
    with pytest.raises(CallerError, match="already"):
        teams.create("b.team", {})
    assert teams.find("b.team") == teams.find(made.team_id) == made
    changed = teams.change_limits(made.team_id, {"max_timeout_s": None, "requests_per_s": 7})
    assert (changed.max_timeout_s, changed.requests_per_s, changed.sandbox_limit) == (None, 7, 3)
    teams.create("a", {})
    create_key(store, changed, scopes=["*"])
    _, revoked = create_key(store, changed, scopes=["*"])
    ApiKeys(store.engine).revoke(revoked.key_id)
    listed = {row.team.name: (row.key_count, row.sandbox_count) for row in teams.list()}
    assert listed == {"a": (0, 0), "b.team": (1, 0)}
    for name in ("", "-x", "a/b", "x" * 65, "a\n"):
        with pytest.raises(CallerError, match="team name"):
            teams.create(name, {})
    for limits in ({"sandbox_limit": -1}, {"max_timeout_s": 0}, {"requests_per_s": 1 << 40}):
        with pytest.raises(CallerError, match="takes"):
            teams.change_limits(made.team_id, limits)
    with pytest.raises(CallerError, match="not found"):
        teams.find("nobody")


def _running(store: Store, node: FakeNode, team_id: str) -> str:
    record = SandboxRecord(
        sandbox_id="i" + "0" * 19,
        team_id=team_id,
        template_id="base",
        access_token="t",
        metadata={},
        created_at_unix_ms=now_ms(),
    )
    store.add_sandbox(record, limit=9, live=())
    node.create(
        NewSandbox(
            sandbox_id=record.sandbox_id,
            template_id="base",
            image="docker.io/vmcell/base:latest",
            vcpus=1,
            memory_mib=64,
            timeout_s=60,
        )
    )
    return record.sandbox_id


def test_a_team_goes_with_its_keys_but_not_from_under_its_sandboxes(store: Store) -> None:
    node, team = FakeNode(), store.ensure_team("one")
    key, _ = create_key(store, team, scopes=["*"])
    sandbox_id = _running(store, node, team.team_id)
    with pytest.raises(CallerError, match="1 running"):
        remove_team(store, node, team, kill=False)
    assert sandbox_id in node.running
    found = ApiKeys(store.engine).find(hash_api_key(key))
    assert found is not None
    assert found.state(now_ms()) == "active", "nothing was begun"
    remove_team(store, node, team, kill=True)
    assert not node.running
    assert not Teams(store.engine).list()
    assert not ApiKeys(store.engine).list()


def test_a_team_that_owns_rows_is_kept_by_the_database(store: Store) -> None:
    team = store.ensure_team("one")
    create_key(store, team, scopes=["*"])
    _running(store, FakeNode(), team.team_id)
    with pytest.raises(CallerError, match="still owns"):
        Teams(store.engine).remove(team.team_id)
    assert [row.key_count for row in Teams(store.engine).list()] == [1], "the keys are there"


def test_rotations_at_once_leave_one_of_each(store: Store) -> None:
    _, old = create_key(store, store.ensure_team("one"), scopes=["*"])
    start = threading.Barrier(4)

    def rotate(_: int) -> bool:
        start.wait(10)
        try:
            rotate_key(store, old.key_id, grace_s=0)
        except CallerError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(rotate, range(4)))
    assert sum(done) == 1
    assert len(ApiKeys(store.engine).list()) == 2


def _entry(number: int, **more: object) -> AuditEntry:
    return AuditEntry(at_unix_ms=now_ms(), actor="key k1", action=f"POST /x{number}", **more)  # type: ignore[arg-type]  # test fields


def test_audit_is_found_by_what_it_says(store: Store) -> None:
    audit = Audit(store.engine)
    audit.add(_entry(1, team_id="t1", target="i1", status=201, request_id="r1"))
    audit.add(_entry(2, team_id="t2", status=404, result="not_found"))
    audit.add(AuditEntry(at_unix_ms=5, actor="operator root", action="key create"))

    def actions(**query: object) -> list[str]:
        return [entry.action for entry in audit.find(AuditQuery(**query))]  # type: ignore[arg-type]  # test fields

    assert actions() == ["key create", "POST /x2", "POST /x1"]
    assert actions(team_id="t1") == ["POST /x1"]
    assert actions(actor="operator root") == ["key create"]
    assert actions(action="POST") == ["POST /x2", "POST /x1"]
    assert actions(action="%") == []
    assert actions(target="i1") == ["POST /x1"]
    assert actions(failures_only=True) == ["POST /x2"]
    assert actions(result="not_found") == ["POST /x2"]
    assert actions(since_unix_ms=6) == ["POST /x2", "POST /x1"]
    assert actions(limit=1) == ["key create"]
    (found,) = audit.find(AuditQuery(team_id="t1"))
    assert (found.status, found.request_id, found.result) == (201, "r1", "ok")


def test_audit_is_bounded_by_rows_and_age(store: Store) -> None:
    audit = Audit(store.engine, keep_days=1, keep_rows=50)
    old = AuditEntry(at_unix_ms=now_ms() - 2 * 86_400_000, actor="a", action="old")
    for number in range(PRUNE_EVERY):
        audit.add(old if number % 2 else _entry(number))
    with store.engine.connect() as connection:
        left = connection.execute(sa.select(AuditRow.action)).scalars().all()
    assert "old" not in left
    assert len(left) == 25


def test_long_texts_are_cut_to_their_columns(store: Store) -> None:
    audit = Audit(store.engine)
    audit.add(_entry(1, target="x" * 1000, request_id="y" * 1000, team_id="z" * 1000))
    (found,) = audit.find(AuditQuery())
    assert (len(found.target), len(found.request_id), len(found.team_id)) == (128, 32, 36)


def test_every_key_of_the_store_has_an_id_of_its_own(store: Store) -> None:
    team = store.ensure_team("one")
    for _ in range(20):
        create_key(store, team, scopes=["*"])
    with store.engine.connect() as connection:
        ids = connection.execute(sa.select(ApiKeyRow.id)).scalars().all()
    assert len(set(ids)) == 20


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("15m", 900), ("12h", 43200), ("30d", 2592000)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1.5h", "1 h", "1w", "9" * 20, "٣s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(CallerError, match="duration"):
        parse_duration_s(text)
