"""`vmcell team`, `key`, `audit` and `migrate` on a store of their own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vmcell_api.identifiers import API_KEY, hash_api_key
from vmcell_api.store.api_keys import ApiKeys
from vmcell_api.store.database import open_engine
from vmcell_tools.cli import main


@pytest.fixture(autouse=True)
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path}/db/api.sqlite"
    config = tmp_path / "api.toml"
    config.write_text(f'node_socket = "{tmp_path}/noded.sock"\napi_uid = 0\n')
    monkeypatch.setenv("VMCELL_API_CONFIG", str(config))
    monkeypatch.setenv("VMCELL_DATABASE_URL", url)
    return url


def _run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def _good(*words: str) -> str:
    result = _run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def _json(*words: str):
    return json.loads(_good(*words, "--json"))


def test_a_key_is_alone_on_standard_output(url: str) -> None:
    result = _run("key", "create", "--team", "me", "--name", "ci", "--expires", "30d")
    key = result.stdout.strip()
    assert API_KEY.fullmatch(key)
    assert "shown once" in result.stderr
    engine = open_engine(url)
    found = ApiKeys(engine).find(hash_api_key(key))
    engine.dispose()
    assert found is not None
    assert (found.team.name, found.name, found.scopes) == ("me", "ci", ("*",))
    table = _good("key", "list")
    assert key not in table
    assert found.key_id in table
    assert key[:12] in table


def test_teams_and_limits() -> None:
    made = _json("team", "create", "one", "--sandboxes", "5", "--timeout", "600")
    assert (made["sandboxLimit"], made["maxTimeout"], made["requestsPerSecond"]) == (5, 600, None)
    changed = _json("team", "limits", "one", "--requests", "9", "--timeout", "default")
    assert (changed["maxTimeout"], changed["requestsPerSecond"]) == (None, 9)
    assert _json("team", "limits", "one") == changed
    (row,) = _json("team", "list")
    assert (row["name"], row["keys"], row["sandboxes"]) == ("one", 0, 0)
    assert "default" in _good("team", "list")
    again = _run("team", "create", "one")
    assert again.exit_code == 1
    assert "vmcell team limits one" in again.stderr


def test_rotate_and_revoke() -> None:
    old = _json("key", "create", "--team", "me", "--scope", "sandboxes:*", "--scope", "team:read")
    fresh = _json("key", "rotate", old["keyID"], "--grace", "1h")
    assert fresh["scopes"] == old["scopes"] == ["sandboxes:*", "team:read"]
    assert fresh["key"] != old["key"]
    _good("key", "revoke", fresh["keyID"])
    states = {row["keyID"]: row["state"] for row in _json("key", "list", "--team", "me")}
    assert states == {old["keyID"]: "active", fresh["keyID"]: "revoked"}


def test_the_audit_tells_what_the_operator_did() -> None:
    made = _json("key", "create", "--team", "me")
    _run("key", "revoke", "k-unknown")
    _good("key", "revoke", made["keyID"])
    rows = _json("audit")
    assert [(row["action"], row["target"], row["result"]) for row in rows] == [
        ("key revoke", made["keyID"], "ok"),
        ("key revoke", "k-unknown", "not_found"),
        ("key create", made["keyID"], "ok"),
    ]
    assert all(row["actor"].startswith("operator ") for row in rows)
    assert made["key"] not in json.dumps(rows)
    assert len(_json("audit", "--failed")) == 1
    assert len(_json("audit", "--team", "me", "--action", "create", "--since", "1h")) == 1
    table = _good("audit", "--limit", "1")
    assert "key revoke" in table
    assert "k-unknown" not in table


def test_a_team_is_not_removed_while_nobody_knows_what_runs() -> None:
    _good("team", "create", "one")
    refused = _run("team", "rm", "one")
    assert refused.exit_code == 1
    assert "noded does not answer" in refused.stderr
    assert len(_json("team", "list")) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["key", "create", "--team", "../x"], "team name"),
        (["key", "create", "--team", "me", "--scope", "root"], "known are"),
        (["key", "create", "--team", "me", "--expires", "soon"], "duration"),
        (["key", "create", "--team", "me", "--expires", "0s"], "lives"),
        (["key", "rotate", "k0"], "not found"),
        (["key", "rotate", "k0", "--grace", "1000d"], "valid for"),
        (["key", "list", "--team", "nobody"], "vmcell team list"),
        (["team", "limits", "nobody"], "vmcell team list"),
        (["team", "create", "a b"], "team name"),
        (["audit", "--since", "never"], "duration"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], told: str) -> None:
    result = _run(*words)
    assert result.exit_code == 1
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_wrong_usage_is_status_2() -> None:
    assert _run("team", "limits", "x", "--timeout", "soon").exit_code == 2
    assert _run("audit", "--limit", "0").exit_code == 2
    assert _run("key", "create").exit_code == 2


def test_the_operators_page_says_what_works() -> None:
    """Its commands, one after the other, on one store; only the key's id is filled in."""
    page = Path(__file__).resolve().parents[2] / "docs" / "operators.md"
    lines = re.findall(r"^ {4}vmcell (.*)$", page.read_text(), re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        if words[1] in ("revoke", "rotate"):
            words[2] = _json("key", "create", "--team", "acme")["keyID"]
        _good(*words)


def test_migrate(url: str) -> None:
    assert "version" in _good("migrate")
    assert Path(url.removeprefix("sqlite:///")).exists()
