"""Digests of large files: made once as long as a file is what it was, and never longer."""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmcell_shim import digests as module
from vmcell_shim.digests import Digests
from vmcell_shim.sparse import content_digest

LENGTH = 200_000


class Counted:
    """Digests of which it is known how many were computed."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.digests = Digests(str(directory))
        self.computed = 0
        monkeypatch.setattr(module, "content_digest", self._compute)

    def _compute(self, fd: int) -> str:
        self.computed += 1
        return content_digest(fd)

    def __call__(self, path: Path) -> str:
        """Checked against the content each time."""
        found = self.digests.of_path(str(path))
        fd = os.open(path, os.O_RDONLY)
        try:
            assert found == content_digest(fd)
        finally:
            os.close(fd)
        return found


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(tmp_path / "digests", monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (LENGTH // 256 + 1))
    settle(path)
    return path


def settle(path: Path) -> None:
    """Returns once the file's last change is old enough to be told from the next."""
    changed = os.stat(path).st_ctime_ns
    while time.time_ns() - changed < module._SETTLED_NS:
        os.sched_yield()


def test_remembered_once_settled(counted: Counted, file: Path) -> None:
    assert counted(file) == counted(file)
    assert counted.computed == 1
    # By another process too, which has nothing but the directory.
    assert Digests(str(counted.directory)).of_path(str(file)) == counted(file)
    assert counted.computed == 1


def test_not_remembered_before(
    counted: Counted, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 3600 * 10**9)
    counted(file)
    counted(file)
    assert counted.computed == 2
    assert not counted.directory.exists()


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def truncate(path: Path) -> None:
    os.truncate(path, LENGTH // 2)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"\xee" * os.stat(path).st_size)
    os.rename(other, path)


def write_and_set_the_time_back(path: Path) -> None:
    times = os.stat(path)
    write(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def punch(path: Path) -> None:
    """The same length, and zeros where there was something."""
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


def write_through_a_map(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[100] ^= 1
        view.flush()


def touch(path: Path) -> None:
    os.utime(path)


CHANGES = (
    write,
    append,
    truncate,
    replace,
    write_and_set_the_time_back,
    punch,
    write_through_a_map,
    touch,
)


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_noticed(
    counted: Counted, file: Path, change: Callable[[Path], None]
) -> None:
    counted(file)
    change(file)
    settle(file)
    counted(file)
    assert counted.computed == 2
    counted(file)
    assert counted.computed == 2


def test_a_change_while_it_is_read_is_not_remembered(
    counted: Counted, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(fd: int) -> str:
        found = content_digest(fd)
        write(file)
        return found

    monkeypatch.setattr(module, "content_digest", slow)
    counted.digests.of_path(str(file))
    assert not counted.directory.exists()


DAMAGED = (
    b"",
    b"null",
    b"5",
    b"[]",
    b"[1]",
    b'[1, "blake2b:00"]',
    b'[[1, 2, 3], "blake2b:00", 1]',
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
)


@pytest.mark.parametrize("record", DAMAGED)
def test_a_damaged_record_is_made_anew(counted: Counted, file: Path, record: bytes) -> None:
    counted(file)
    (path,) = counted.directory.iterdir()
    good = path.read_bytes()
    path.write_bytes(record)
    counted(file)
    assert counted.computed == 2
    assert path.read_bytes() == good


def test_a_record_without_its_digest(counted: Counted, file: Path) -> None:
    counted(file)
    (path,) = counted.directory.iterdir()
    identity, _ = json.loads(path.read_text())
    path.write_text(json.dumps([identity, None]))
    counted(file)
    assert counted.computed == 2


def test_every_cut_of_a_record(counted: Counted, file: Path) -> None:
    counted(file)
    (path,) = counted.directory.iterdir()
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        counted(file)
    assert counted.computed == len(good) + 1


def threads(count: int, act: Callable[[], None]) -> Iterator[BaseException]:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    workers = [threading.Thread(target=guarded) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    yield from failures


def test_many_users_at_once(counted: Counted, file: Path) -> None:
    """Their records replace each other's, each of them whole; nothing else is left."""

    def act() -> None:
        for _ in range(50):
            for path in list(counted.directory.iterdir()):
                if "." not in path.name:
                    path.unlink(missing_ok=True)
            counted(file)

    counted(file)
    assert list(threads(8, act)) == []
    counted(file)
    assert len(list(counted.directory.iterdir())) == 1


def test_a_directory_that_takes_no_record(
    counted: Counted, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(module.os, "rename", full)
    with pytest.raises(OSError, match="no space"):
        counted.digests.of_path(str(file))
    assert list(counted.directory.iterdir()) == []


def test_records_nobody_finds_are_forgotten(
    counted: Counted, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_RECORDS", 10)
    counted.directory.mkdir()
    for number in range(10):
        record = counted.directory / f"0-{number:x}"
        record.write_text("[]")
        os.utime(record, ns=(number, number))
    counted(file)
    left = {path.name for path in counted.directory.iterdir()}
    assert left.isdisjoint(f"0-{number:x}" for number in range(5))
    assert len(left) == 6
    counted(file)
    assert counted.computed == 1, "the newest is kept"
