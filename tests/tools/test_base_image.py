"""The guest's base image: what goes in, and that the same inputs give the same DAX-able bytes."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import HostError
from vmcell_tools import base_image, debian_tree
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.debian_tree import Package, closure_versions, named_versions
from vmcell_tools.progress import Progress

QUIET = Progress("test", quiet=True)
IDENTITY = uuid.UUID(int=1)
STEP = 2 << 20


def make_tree(folder: Path, names: list[str], mtime: int) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # a tail shorter than a block, which mkfs.erofs would like to store with the inode
        path.write_bytes(name.encode() * 1000)
        os.utime(path, (mtime, mtime))
    return folder


def test_the_image_depends_on_nothing_but_the_files(tmp_path: Path) -> None:
    names = ["a/one", "a/two", "b/three", "c"]
    for number, order in enumerate((names, names[::-1])):
        tree = make_tree(tmp_path / f"tree{number}", order, mtime=1_000_000 + number)
        base_image.make_erofs(tree, tmp_path / f"image{number}", IDENTITY)
    one, two = ((tmp_path / f"image{number}").read_bytes() for number in (0, 1))
    assert one == two
    assert len(one) % STEP == 0


def test_no_file_has_an_inlined_tail(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", ["short", "long"], mtime=0)
    image = tmp_path / "image"
    base_image.make_erofs(tree, image, IDENTITY)
    for name in ("short", "long"):
        shown = subprocess.run(
            ["dump.erofs", f"--path=/{name}", image],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        # EROFS on-disk format: layout 0 is FLAT_PLAIN, 2 is FLAT_INLINE
        assert "Layout: 0" in shown, shown


def test_a_tree_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"mkfs\.erofs failed"):
        base_image.make_erofs(tmp_path / "none", tmp_path / "image", IDENTITY)


def test_the_kernel_can_start_init() -> None:
    interpreter, *rest = base_image.INIT.splitlines()
    # binfmt_script: 255 bytes of the first line are read, and one argument is passed
    assert interpreter.startswith("#!/usr/bin/python3.11 -")
    assert len(interpreter) < 127
    assert len(interpreter.split()) == 2
    compile("\n".join(rest), "init", "exec")


def test_the_agent_goes_in_without_what_needs_more_libraries() -> None:
    targets = {target for target, _ in base_image._agent_files()}
    assert {"vmcell_agent/__main__.py", "vmcell_protos/ttrpc.py", "h11/__init__.py"} <= targets
    assert not any("/pb/" in target or "__pycache__" in target for target in targets)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,20}", fullmatch=True)
VERSIONS = st.from_regex(r"([1-9]%3a)?[0-9][0-9.+~-]{0,8}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, VERSIONS), min_size=1, max_size=5))
def test_apts_uri_lines_are_read_whole(rows: list[tuple[str, str]]) -> None:
    text = "N: a notice of apt\n" + "".join(
        f"'http://archive/pool/{name}_{version}_amd64.deb' {name}_{version}_amd64.deb 12 SHA256:\n"
        for name, version in rows
    )
    found = [(m["name"], m["version"]) for m in debian_tree._URI_LINE.finditer(text)]
    assert found == rows


def test_apts_install_lines_are_read_whole() -> None:
    text = (
        "Inst gcc-12-base (12.2.0-14+deb12u1 Debian:12.15/oldstable [amd64])\n"
        "Conf gcc-12-base (12.2.0-14+deb12u1 Debian:12.15/oldstable [amd64])\n"
        "Inst libc6 [2.36-1] (2.36-9 Debian:12.15/oldstable [amd64]) []\n"
        "Inst libc6:i386 (2.36-9 Debian:12.15/oldstable [i386])\n"
    )
    found = [(m["name"], m["version"]) for m in debian_tree._INSTALL_LINE.finditer(text)]
    assert found == [("gcc-12-base", "12.2.0-14+deb12u1"), ("libc6", "2.36-9"), ("libc6", "2.36-9")]


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that logs its calls and knows one package; its lists are in `lists`."""
    lists, programs = tmp_path / "lists", tmp_path / "bin"
    lists.mkdir()
    programs.mkdir()
    (lists / "archive_Packages").touch()
    script = programs / "apt-get"
    script.write_text(
        f"#!/bin/sh\necho call >> {tmp_path}/calls\n"
        "case \"$*\" in *nothing*) echo 'E: no such package'; exit 100;; esac\n"
        "echo \"'http://archive/libx_1%3a2-3_amd64.deb' libx_1%3a2-3_amd64.deb 9 SHA256:00\"\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(debian_tree, "APT_LISTS", lists)
    return tmp_path


def test_versions_are_asked_for_once_per_state_of_apts_lists(apt: Path) -> None:
    cache = BuildCache(apt / "cache")
    for _ in range(2):
        assert named_versions(cache, ["libx"], QUIET) == (Package("libx", "1:2-3"),)
    assert (apt / "calls").read_text() == "call\n"
    (apt / "lists/archive_Packages").write_text("news")
    named_versions(cache, ["libx"], QUIET)
    assert (apt / "calls").read_text() == "call\n" * 2


def test_missing_lists_and_unknown_packages_are_one_sentence_each(apt: Path) -> None:
    cache = BuildCache(apt / "cache")
    with pytest.raises(HostError, match="E: no such package"):
        named_versions(cache, ["nothing"], QUIET)
    with pytest.raises(HostError, match="apt knows no version of libx"):
        closure_versions(cache, ["libx"], QUIET)
    (apt / "lists/archive_Packages").unlink()
    with pytest.raises(HostError, match="run: apt-get update"):
        named_versions(cache, ["libx"], QUIET)
    assert not [path for path in cache.root.glob("*/*") if path.name != ".lock"]
