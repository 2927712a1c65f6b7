"""`vmcell snapshot` against the API with a fake node, over loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service, listening
from click.testing import CliRunner, Result

from vmcell_tools.cli import main

UNKNOWN = "i" + "0" * 19
MISSING = "snap-" + "0" * 20


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with api_service(tmp_path) as running, listening(running.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", running.key)
        yield running


def _run(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["snapshot", *words])
    assert result.exit_code == status, result.output
    return result


def _json(*words: str) -> object:
    return json.loads(_run(*words, "--json").stdout)


def _sandbox(template: str = "base") -> str:
    result = CliRunner().invoke(main, ["sandbox", "create", template])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def _snapshot(sandbox_id: str, *words: str) -> str:
    return _run("create", sandbox_id, *words).stdout.strip()


def test_create_list_delete(service: ApiService) -> None:
    first, second = _sandbox(), _sandbox()
    result = _run("create", first, "--name", "ready:v1")
    snapshot_id = result.stdout.strip()
    assert result.stdout == f"{snapshot_id}\n", "the id alone, for a shell's $(…)"
    assert f"saving {first}" in result.stderr
    assert list(service.node.saved) == [snapshot_id]
    made = _json("create", second)
    assert made["names"] == []
    rows = {row["snapshotID"]: row["names"] for row in _json("list")}
    assert rows == {snapshot_id: ["ready:v1"], made["snapshotID"]: []}
    table = [line.split() for line in _run("list").stdout.splitlines()]
    assert table[0] == ["id", "name"]
    assert sorted(table[1:]) == sorted([[snapshot_id, "ready:v1"], [made["snapshotID"]]])
    assert [row["snapshotID"] for row in _json("list", "--sandbox", first)] == [snapshot_id]
    assert [row["snapshotID"] for row in _json("list", "--name", "ready:v1")] == [snapshot_id]
    assert _json("list", "--sandbox", UNKNOWN) == []
    assert _sandbox("ready:v1") in service.node.running
    assert _run("delete", "ready:v1").stdout == f"deleted {snapshot_id}\n"
    assert _json("delete", made["snapshotID"]) == {"deleted": [made["snapshotID"]]}
    assert service.node.saved == {}


def test_list_reads_every_page(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmcell_api.sandbox_bodies.MAX_PAGE", 2)
    sandbox_id = _sandbox()
    ids = {_snapshot(sandbox_id) for _ in range(5)}
    assert {row["snapshotID"] for row in _json("list")} == ids


def test_delete_never_takes_a_template(service: ApiService) -> None:
    """Both are deleted by the same route."""
    result = CliRunner().invoke(main, ["template", "list", "--json"])
    before = json.loads(result.stdout)
    for row in before:
        for name in (row["templateID"], *row["names"]):
            assert "there is no snapshot" in _run("delete", name, status=1).stderr, name
    kept = _snapshot(_sandbox(), "--name", "kept")
    assert "there is no snapshot" in _run("delete", MISSING, "kept", status=1).stderr
    assert list(service.node.saved) == [kept]
    assert json.loads(CliRunner().invoke(main, ["template", "list", "--json"]).stdout)


def test_diff(service: ApiService) -> None:
    _sandbox()
    sandbox_id = _sandbox()
    _sandbox()
    older, newer = _snapshot(sandbox_id, "--name", "one"), _snapshot(sandbox_id)
    result = _run("diff", "one", newer)
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["part"],
        ["memory", "changed"],
        ["disk", "the", "same"],
        ["on", "disk:", "0.0", "MiB,", "then", "0.0", "MiB"],
        ["which", "files", "differ:", "--files"],
    ]
    assert f"comparing one and {newer}" in result.stderr
    assert _run("diff", older, newer, "--sandbox", sandbox_id).stdout == result.stdout
    told = _json("diff", older, newer)
    assert (told["older"], told["newer"], told["changed"]) == (older, newer, ["memory"])
    assert "files" not in told
    assert _json("diff", older, newer, "--files")["files"][0]["path"] == "/a"
    lines = [line.split() for line in _run("diff", older, newer, "--files").stdout.splitlines()]
    assert lines[-2:] == [["change", "bytes", "then", "file"], ["modified", "1", "2", "/a"]]


def test_diff_without_changes_and_with_odd_paths(
    service: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmcell_api.snapshot_facts import FileChange

    sandbox_id = _sandbox()
    ids = [_snapshot(sandbox_id) for _ in range(2)]
    monkeypatch.setattr(service.node, "file_changes", lambda older, newer: [])
    assert "no file differs" in _run("diff", *ids, "--files").stdout
    odd = FileChange(path="/[b]\x1b[2J", what="added", size_before=0, size_after=7)
    monkeypatch.setattr(service.node, "file_changes", lambda older, newer: [odd])
    assert r"/[b]\x1b[2J" in _run("diff", *ids, "--files").stdout


def test_diff_wants_two_of_one_sandbox(service: ApiService) -> None:
    first, second = _sandbox(), _sandbox()
    one, two = _snapshot(first), _snapshot(second, "--name", "two")
    error = _run("diff", one, "two", status=1).stderr
    assert f"is none of sandbox {second}" in error or f"is none of sandbox {first}" in error
    assert "see: vmcell sandbox history" in error
    assert "no sandbox has the snapshots" in _run("diff", MISSING, MISSING, status=1).stderr
    assert "there is no snapshot 'nosuch'" in _run("diff", "nosuch", one, status=1).stderr
    refused = _run("diff", one, two, "--sandbox", first, status=1).stderr
    assert f"snapshot '{two}' is none of sandbox {first}" in refused
    assert "vmcell sandbox history ID" in refused


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("create", UNKNOWN), 1, "was not found; see: vmcell sandbox list"),
        (("create", ""), 1, "'' is no sandbox id; see: vmcell sandbox list"),
        (("create", "{sandbox}", "--name", "a b"), 1, "a b"),
        (("create", "{sandbox}", "--name", "base"), 1, "is the name of a template"),
        (("create",), 2, "Missing argument 'SANDBOX'"),
        (("delete",), 2, "Missing argument"),
        (("delete", ""), 1, "there is no snapshot ''"),
        (("delete", MISSING), 1, "vmcell snapshot list"),
        (("list", "--name", "a b"), 1, "a b"),
        (("diff", MISSING), 2, "Missing argument 'NEWER'"),
    ],
)
def test_bad_input(service: ApiService, words: tuple[str, ...], status: int, sentence: str) -> None:
    sandbox_id = _sandbox()
    result = _run(*(word.format(sandbox=sandbox_id) for word in words), status=status)
    assert sentence in result.stderr
    assert service.node.saved == {}


def test_a_paused_sandbox_has_no_new_snapshot(service: ApiService) -> None:
    sandbox_id = _sandbox()
    assert CliRunner().invoke(main, ["sandbox", "pause", sandbox_id]).exit_code == 0
    assert "is paused" in _run("create", sandbox_id, status=1).stderr
