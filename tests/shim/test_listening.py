"""Sockets that appear listening: one winner, no live one displaced, nothing but the socket left."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmcell_protos.errors import HostError
from vmcell_shim import listening
from vmcell_shim.listening import answers, listen, remove_dead


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because a socket's path has 106 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="vmcell-l") as directory:
        yield Path(directory)


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_a_socket_listens_privately_and_alone_in_its_folder(folder: Path) -> None:
    path = folder / "deep/s"
    listener = listen(str(path))
    assert listener is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["s"]
    assert answers(str(path))
    assert listen(str(path)) is None
    assert os.listdir(path.parent) == ["s"]
    listener.close()
    assert not answers(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_dead_one_is_replaced(folder: Path, kind: int) -> None:
    path = str(folder / "s")
    for _ in range(2):
        listener = listen(path, kind)
        assert listener is not None
        assert answers(path, kind)
        listener.close()


def test_one_that_takes_nobody_now_still_answers(folder: Path) -> None:
    path = str(folder / "s")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        assert answers(path)
        assert listen(path) is None
        remove_dead(path)
        assert os.path.exists(path)


def test_only_the_dead_are_removed(folder: Path) -> None:
    dead_socket(folder / "s")
    remove_dead(str(folder / "s"))
    assert os.listdir(folder) == []
    remove_dead(str(folder / "s"))
    remove_dead(str(folder / "none/s"))


def test_what_a_killed_process_left_half_made_is_no_hindrance(folder: Path) -> None:
    dead_socket(folder / f".{os.getpid()}")
    listener = listen(str(folder / "s"))
    assert listener is not None
    assert os.listdir(folder) == ["s"]
    listener.close()


def race(path: str, count: int) -> bytes:
    """Runs `listen(path)` in `count` processes at once; "w" for each that won, "l" for the others.

    All of them live until the last has tried.
    """
    go, go_write = os.pipe()
    end, end_write = os.pipe()
    results, result = os.pipe()
    children = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(go_write)
            os.close(end_write)
            os.read(go, 1)
            listener = listen(path)
            os.write(result, b"w" if listener is not None and answers(path) else b"l")
            os.read(end, 1)
            os._exit(0)
        children.append(pid)
    os.close(go_write)
    said = b"".join(os.read(results, 1) for _ in children)
    os.close(end_write)
    for pid in children:
        os.waitpid(pid, 0)
    for fd in (go, end, results, result):
        os.close(fd)
    return said


@pytest.mark.parametrize("before", [dead_socket, lambda path: None], ids=["dead", "nothing"])
def test_of_ten_at_once_one_wins(folder: Path, before: Callable[[Path], None]) -> None:
    for _ in range(10):
        before(folder / "s")
        assert race(str(folder / "s"), 10).count(b"w") == 1
        assert os.listdir(folder) == ["s"]
        (folder / "s").unlink()


def test_a_lock_that_is_never_given_back_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_LOCK_TIMEOUT_S", 0.05)
    dead_socket(folder / "s")
    holder = os.open(folder, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(HostError, match="cannot remove the dead socket"):
        remove_dead(str(folder / "s"))
    with pytest.raises(HostError):
        listen(str(folder / "s"))
    os.close(holder)


def test_a_path_that_cannot_be_is_an_error(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(HostError, match="cannot listen on"):
        listen(str(folder / "file/s"))
    with pytest.raises(HostError, match="cannot listen on"):
        listen(str(folder / ("x" * 300)))
    assert os.listdir(folder) == ["file"]
