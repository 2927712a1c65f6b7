"""Steps of a build: which are refused, what they are called in the cache, what their scripts do."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.node.build_steps import (
    Step,
    absolute,
    check_steps,
    copy_script,
    first_key,
    last_key,
    make_user_script,
    next_key,
    value_script,
)
from vmcell_protos.errors import CallerError

HASH = "ab" * 32
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)


def _copy(source: str, destination: str, user: str = "", mode: str = "") -> Step:
    return Step(type="COPY", args=(source, destination, user, mode), files_hash=HASH)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step(type="ADD", args=("a", "b")), "has the steps"),
        (Step(type="RUN", args=()), "0 arguments"),
        (Step(type="RUN", args=("",)), "empty"),
        (Step(type="ENV", args=("A",)), "name and value"),
        (Step(type="ENV", args=("A=B", "c")), "no name of a variable"),
        (Step(type="WORKDIR", args=("/a", "/b")), "2 arguments"),
        (Step(type="COPY", args=("a", "/b")), "filesHash"),
        (_copy("../a", "/b"), "leads out"),
        (_copy("a/../../b", "/b"), "leads out"),
        (_copy("/etc/passwd", "/b"), "leads out"),
        (_copy("a/**/b", "/b"), "does not expand"),
        (_copy("a", ""), "no destination"),
        (_copy("a", "/b", "me;rm"), "no user"),
        (_copy("a", "/b", mode="rwx"), "not octal"),
        (Step(type="RUN", args=("a\0b",)), "NUL"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_number(step: Step, words: str) -> None:
    with pytest.raises(CallerError, match=words) as caught:
        check_steps([Step(type="RUN", args=("true",)), step])
    assert str(caught.value).startswith("step 2")


@given(
    kind=st.sampled_from(("COPY", "RUN", "ENV", "WORKDIR", "USER", "X", "")),
    args=st.lists(TEXT, max_size=5),
    files_hash=st.sampled_from(("", HASH, "AB" * 32, "zz")),
)
def test_any_step_is_taken_or_refused(kind: str, args: list[str], files_hash: str) -> None:
    step = Step(type=kind, args=tuple(args), files_hash=files_hash)
    try:
        check_steps([step])
    except CallerError:
        return
    assert kind in ("COPY", "RUN", "ENV", "WORKDIR", "USER")
    if kind == "COPY":
        script = copy_script(step, folder="/f", packed=False, user="user", workdir="/w")
        assert subprocess.run(["sh", "-n"], input=script.encode(), check=False).returncode == 0


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4, unique=True))
def test_keys_tell_all_steps_and_their_order_apart(pairs: list[tuple[str, str]]) -> None:
    first = first_key("team", "sha256:x")
    keys = {next_key(first, Step(type="RUN", args=pair)) for pair in pairs}
    assert len(keys) == len(pairs)
    one, two = Step(type="RUN", args=("a",)), Step(type="RUN", args=("b",))
    assert next_key(next_key(first, one), two) != next_key(next_key(first, two), one)
    assert next_key(first, Step(type="RUN", args=("ab", ""))) != next_key(
        first, Step(type="RUN", args=("a", "b"))
    )
    assert last_key(first, "a", "b") != last_key(first, "ab", "")
    assert first_key("other", "sha256:x") != first


@given(path=TEXT, workdir=TEXT)
def test_paths_are_absolute_and_have_no_dots(path: str, workdir: str) -> None:
    found = absolute(path, workdir)
    assert found.startswith("/")
    assert ".." not in found.split("/")


def test_paths_go_on_from_the_working_directory() -> None:
    assert absolute("app", "/srv") == "/srv/app"
    assert absolute("/app/", "/srv") == "/app/"
    assert absolute(".", "/srv") == "/srv"
    assert absolute("../../..", "/srv") == "/"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, blacklist_characters="\\$")))
def test_a_value_without_dollars_is_printed_as_it_is(value: str) -> None:
    done = subprocess.run(["sh", "-c", value_script(value)], capture_output=True, check=True)
    assert done.stdout.decode() == value


def test_a_value_has_variables_and_runs_nothing(tmp_path: Path) -> None:
    value = "$A:${B}:`touch x`:$(touch y)"
    done = subprocess.run(
        ["sh", "-c", value_script(value)],
        env={"A": "1", "B": "2 3", "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == "1:2 3:`touch x`:$(touch y)"
    assert list(tmp_path.iterdir()) == []


FILES = {"app/one.txt": b"1", "app/sub/two.txt": b"2", "a b/$x.txt": b"3", "top.txt": b"4"}


def _copied(tmp_path: Path, source: str, destination: str, mode: str = "") -> dict[str, bytes]:
    """What COPY makes of FILES below a destination in `tmp_path`."""
    folder, target = tmp_path / "f", tmp_path / "t"
    folder.mkdir()
    target.mkdir()
    with tarfile.open(folder / "files", "w:gz") as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    step = _copy(source, destination, mode=mode)
    check_steps([step])
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    script = copy_script(step, folder=str(folder), packed=True, user=user, workdir=str(target))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("top.txt", "new.txt", {"new.txt": b"4"}),
        ("top.txt", "dir/", {"dir/top.txt": b"4"}),
        ("./top.txt", "a/b/c", {"a/b/c": b"4"}),
        ("top.txt", ".", {"top.txt": b"4"}),
        ("app", "srv", {"srv/one.txt": b"1", "srv/sub/two.txt": b"2"}),
        ("app/", "srv/", {"srv/one.txt": b"1", "srv/sub/two.txt": b"2"}),
        ("app/*", "srv", {"srv/one.txt": b"1", "srv/two.txt": b"2"}),
        ("a b/$x.txt", "x y", {"x y": b"3"}),
        ("t?p.[t]xt", "new", {"new": b"4"}),
    ],
)
def test_copy_as_a_dockerfile_does(
    tmp_path: Path, source: str, destination: str, expected: dict[str, bytes]
) -> None:
    assert _copied(tmp_path, source, destination) == expected


def test_copy_of_everything_with_a_mode(tmp_path: Path) -> None:
    assert _copied(tmp_path, ".", "all", mode="0640") == {
        f"all/{name}": content for name, content in FILES.items()
    }
    assert (tmp_path / "t/all/app/one.txt").stat().st_mode & 0o7777 == 0o640
    assert (tmp_path / "t/all/app").stat().st_mode & 0o7777 == 0o750


def test_the_users_script_is_plain_sh() -> None:
    assert (
        subprocess.run(["sh", "-n"], input=make_user_script().encode(), check=False).returncode == 0
    )
