"""Builds appear whole or not at all, once each, also on a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.progress import Progress

QUIET = Progress("test", quiet=True)


@pytest.fixture
def cache(tmp_path: Path) -> BuildCache:
    return BuildCache(tmp_path / "cache")


def left_over(cache: BuildCache) -> list[Path]:
    """Everything in the cache that is no lock and no directory of a kind."""
    return [path for path in cache.root.glob("*/*") if path.name != ".lock"]


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_digests_are_equal_for_equal_parts_only(one: list[bytes], two: list[bytes]) -> None:
    assert (input_digest(*one) == input_digest(*two)) == (one == two)


def test_the_default_root_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert BuildCache.default().root == Path("/somewhere/vmcell")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert BuildCache.default().root == Path.home() / ".cache/vmcell"


def test_another_users_cache_is_named(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.build("kind", "d1", lambda work: None, QUIET)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, "utime", refuse)
    with pytest.raises(CallerError, match=r"cache is another user's; .*XDG_CACHE_HOME"):
        cache.build("kind", "d1", lambda work: pytest.fail("built twice"), QUIET)


def test_a_finished_build_is_not_made_again(cache: BuildCache) -> None:
    first = cache.build("kind", "d1", lambda work: (work / "x").write_text("1") and None, QUIET)
    again = cache.build("kind", "d1", lambda work: pytest.fail("built twice"), QUIET)
    assert first == again == cache.find("kind", "d1")
    assert (again / "x").read_text() == "1"
    assert cache.find("kind", "d2") is None


def test_whatever_is_raised_nothing_is_left(cache: BuildCache) -> None:
    def fill(work: Path) -> None:
        (work / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build("kind", "d1", fill, QUIET)
    assert not left_over(cache)


def test_what_a_killed_build_left_is_removed_by_the_next(cache: BuildCache) -> None:
    stale = cache.root / "kind/.building-dead"
    stale.mkdir(parents=True)
    (stale / "half").touch()
    cache.build("kind", "d1", lambda work: None, QUIET)
    assert [path.name for path in left_over(cache)] == ["d1"]


def test_two_at_once_build_once(cache: BuildCache) -> None:
    filled: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def fill(work: Path) -> None:
        filled.append(1)
        begun.set()
        assert go_on.wait(20)
        (work / "x").touch()

    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.build("kind", "d1", fill, QUIET)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(filled) == 1
    assert len(results) == 3
    assert len(set(results)) == 1


def test_only_the_newest_are_kept(cache: BuildCache) -> None:
    for number in range(4):
        built = cache.build("kind", f"d{number}", lambda work: None, QUIET)
        os.utime(built, (number, number))
    cache.build("kind", "d0", lambda work: None, QUIET)  # asked for again, so newest
    cache.keep_newest("kind", 2)
    assert sorted(path.name for path in left_over(cache)) == ["d0", "d3"]


def test_an_unwritable_root_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"cannot build kind in .*file"):
        BuildCache(tmp_path / "file").build("kind", "d1", lambda work: None, QUIET)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "vmcell-test", mount], check=True, timeout=20
    )
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True, timeout=20)


def by_write(work: Path) -> None:
    (work / "big").write_bytes(bytes(4 << 20))


def by_tool(work: Path) -> None:
    run_step(["dd", "if=/dev/zero", f"of={work}/big", "bs=64k", "count=64"], deadline_s=20)


def by_tool_that_does_not_say_why(work: Path) -> None:
    run_step(["sh", "-c", f"head -c 4M /dev/zero 2>&1 > {work}/big | :; exit 3"], deadline_s=20)


@pytest.mark.root
@pytest.mark.parametrize("fill", [by_write, by_tool, by_tool_that_does_not_say_why])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(small_disk: Path, fill: object) -> None:
    cache = BuildCache(small_disk / "cache")
    with pytest.raises(HostError) as caught:
        cache.build("image", "d1", fill, QUIET)  # type: ignore[arg-type]
    assert caught.value.code == "resource_exhausted"
    assert "no space left" in str(caught.value)
    assert "XDG_CACHE_HOME" in str(caught.value)
    assert not left_over(cache)
    status = os.statvfs(small_disk)
    assert status.f_bfree * status.f_frsize > 900_000


def test_a_step_returns_what_it_printed_and_tells_each_line(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "log"
    shown = run_step(
        ["sh", "-c", "echo one; echo two >&2"], deadline_s=20, on_line=lines.append, log=log
    )
    assert shown == "one\ntwo\n" == log.read_text()
    assert lines == ["one\n", "two\n"]


def test_a_failing_step_tells_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(HostError, match=r"sh failed with status 3: bad things .all of it: .*log"):
        run_step(["sh", "-c", "echo bad things; exit 3"], deadline_s=20, log=log)
    with pytest.raises(HostError, match="it printed nothing"):
        run_step(["false"], deadline_s=20)


def test_a_missing_command_is_one_sentence() -> None:
    with pytest.raises(HostError, match="no-such-command is not installed; run: tools/inst"):
        run_step(["no-such-command"], deadline_s=20)


def test_a_full_disk_in_a_tool_is_the_full_disk_error() -> None:
    with pytest.raises(OSError) as caught:
        run_step(["sh", "-c", "cat /dev/zero > /dev/full"], deadline_s=20)
    assert caught.value.errno == errno.ENOSPC


def test_the_deadline_ends_the_whole_group(tmp_path: Path) -> None:
    child = tmp_path / "child"
    began = time.monotonic()
    with pytest.raises(HostError, match="had not ended after 1 s"):
        run_step(["sh", "-c", f"sleep 60 & echo $! > {child}; wait"], deadline_s=1.0)
    assert time.monotonic() - began < 20
    pid = int(child.read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in state(pid):
        assert time.monotonic() < deadline, "a child outlived the deadline"
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
