"""POST /files/compose: all sources in one file and gone, or nothing changed at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from envd_client import Answer, request
from envd_harness import USER_UID, Envd

pytestmark = pytest.mark.root


def compose(envd: Envd, **message: object) -> Answer:
    return request(envd, "POST", "/files/compose", json.dumps(message).encode())


@pytest.fixture
def folder(envd: Envd) -> Path:
    """A fresh directory inside the container, seen from outside."""
    place = envd.path(f"/home/user/{os.urandom(4).hex()}")
    place.mkdir()
    (place / "a").write_bytes(b"1" * 300_000)
    (place / "b").write_bytes(b"")
    (place / "c").write_bytes(b"2")
    return place


def test_parts_become_one_file_of_the_user(envd: Envd, folder: Path) -> None:
    inside = f"/home/user/{folder.name}"
    answer = compose(
        envd,
        source_paths=[f"{inside}/a", f"{folder.name}/b", f"~/{folder.name}/c"],
        destination=f"{inside}/deep/er/whole.bin",
        username="user",
    )
    assert answer.status == 200
    path = f"{inside}/deep/er/whole.bin"
    assert answer.json() == {"path": path, "name": "whole.bin", "type": "file"}
    whole = folder / "deep/er/whole.bin"
    assert whole.read_bytes() == b"1" * 300_000 + b"2"
    assert (whole.stat().st_uid, oct(whole.stat().st_mode)) == (USER_UID, "0o100644")
    assert sorted(os.listdir(folder)) == ["deep"]


def test_a_present_destination_is_replaced(envd: Envd, folder: Path) -> None:
    (folder / "whole").write_bytes(b"old")
    sources = [f"{folder.name}/c", f"{folder.name}/c"]
    assert compose(envd, source_paths=sources, destination=f"{folder.name}/whole").status == 200
    assert (folder / "whole").read_bytes() == b"22"


@pytest.mark.parametrize(
    ("sources", "destination", "more", "status", "text"),
    [
        ([], "x", {}, 400, "source_paths"),
        (["a"], "", {}, 400, "destination"),
        (["a"], "a", {}, 400, "same as destination"),
        (["a", "none"], "x", {}, 404, "does not exist"),
        (["a", "."], "x", {}, 400, "not a regular file"),
        (["a"], ".", {}, 400, "is a directory"),
        (["a"], "c/x", {}, 400, "no directory"),
        (["a"], "x", {"username": "nobody-here"}, 401, "error looking up user 'nobody-here'"),
        (["a", 5], "x", {}, 400, "string"),
    ],
)
def test_what_cannot_be_composed_changes_nothing(
    envd: Envd,
    folder: Path,
    sources: list[object],
    destination: str,
    more: dict[str, str],
    status: int,
    text: str,
) -> None:
    before = sorted(os.listdir(folder))

    def place(name: object) -> object:
        return f"/home/user/{folder.name}/{name}" if isinstance(name, str) and name else name

    answer = compose(
        envd,
        source_paths=[place(source) for source in sources],
        destination=place(destination),
        **more,
    )
    assert answer.status == status, answer.body
    assert answer.json()["code"] == status
    assert text in answer.json()["message"]
    assert sorted(os.listdir(folder)) == before


def test_a_full_disk_is_told_and_leaves_the_parts(envd: Envd, folder: Path) -> None:
    sources = [f"/home/user/{folder.name}/a"] * 5
    answer = compose(envd, source_paths=sources, destination="/low/whole")
    assert answer.status == 507, answer.body
    assert os.listdir(envd.path("/low")) == []
    assert (folder / "a").exists()


def test_bodies_that_are_no_message(envd: Envd) -> None:
    for body in (b"", b"[]", b"{", b'{"source_paths":"a","destination":"b"}'):
        assert request(envd, "POST", "/files/compose", body).status == 400
    assert request(envd, "GET", "/files/compose").status == 405
