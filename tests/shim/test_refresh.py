"""Copies follow their sources, and what a container wrote goes back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmcell_protos.agent import FileCopy
from vmcell_shim.binds import BindCopy, plan_bind
from vmcell_shim.refresh import Refresh

DEADLINE_S = 10.0


class Guest:
    """What has been pushed, by destination; None for what was removed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | None] = {}
        self._arrived = threading.Condition()

    def push(self, files: list[FileCopy]) -> None:
        with self._arrived:
            for file in files:
                self.files[file.destination] = None if file.remove else file.content
            self._arrived.notify_all()

    def wait_for(self, destination: str, content: bytes | None) -> None:
        with self._arrived:
            assert self._arrived.wait_for(
                lambda: self.files.get(destination, b"-") == content, DEADLINE_S
            ), self.files


def copied(source: Path, destination: str, *options: str) -> BindCopy:
    mount = {"source": str(source), "destination": destination, "options": list(options)}
    bind = plan_bind(mount)
    assert isinstance(bind, BindCopy)
    return bind


@contextmanager
def refreshing(*binds: BindCopy) -> Iterator[Guest]:
    guest = Guest()
    refresh = Refresh(list(binds), guest.push)
    refresh.start()
    try:
        yield guest
    finally:
        refresh.close()


def test_a_file_written_in_place(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one")
    with refreshing(copied(hosts, "/etc/hosts")) as guest:
        hosts.write_text("two")
        guest.wait_for("/etc/hosts", b"two")


def test_a_file_replaced_twice(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one")
    with refreshing(copied(hosts, "/etc/hosts", "ro")) as guest:
        for text in ("two", "three"):
            (tmp_path / "new").write_text(text)
            os.rename(tmp_path / "new", hosts)
            guest.wait_for("/etc/hosts", text.encode())


def test_a_config_map_that_is_swapped(tmp_path: Path) -> None:
    """The way of kubelet's atomic writer: a new dated directory, then a link renamed over."""
    volume = tmp_path / "volume"
    (volume / "..1").mkdir(parents=True)
    (volume / "..1" / "key").write_text("one")
    (volume / "..1" / "old").write_text("x")
    (volume / "..data").symlink_to("..1")
    for name in ("key", "old"):
        (volume / name).symlink_to(f"..data/{name}")
    with refreshing(copied(volume, "/config", "ro")) as guest:
        (volume / "..2").mkdir()
        (volume / "..2" / "key").write_text("two")
        (volume / "..new").symlink_to("..2")
        os.rename(volume / "..new", volume / "..data")
        guest.wait_for("/config/key", b"two")
        (volume / "old").unlink()
        guest.wait_for("/config/old", None)
        (volume / "key").unlink()
        guest.wait_for("/config/key", None)


def test_a_change_between_reading_and_watching_is_not_lost(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one")
    bind = copied(hosts, "/etc/hosts")
    hosts.write_text("two")
    with refreshing(bind) as guest:
        guest.wait_for("/etc/hosts", b"two")


def test_what_outgrows_a_copy_is_left_as_it_was(tmp_path: Path) -> None:
    hosts, other = tmp_path / "hosts", tmp_path / "other"
    hosts.write_text("one")
    other.write_text("one")
    with refreshing(copied(hosts, "/etc/hosts"), copied(other, "/other")) as guest:
        (tmp_path / "new").write_bytes(bytes(2 << 20))
        os.rename(tmp_path / "new", hosts)
        other.write_text("two")
        guest.wait_for("/other", b"two")
        assert "/etc/hosts" not in guest.files


@pytest.mark.parametrize(
    ("options", "now", "expected"),
    [
        ((), b"written", b"written"),
        ((), b"one", b"one"),
        ((), None, b"one"),
        (("ro",), b"written", b"one"),
    ],
)
def test_write_back(
    tmp_path: Path, options: tuple[str, ...], now: bytes | None, expected: bytes
) -> None:
    log = tmp_path / "termination-log"
    log.write_bytes(b"one")
    refresh = Refresh([copied(log, "/dev/termination-log", *options)], lambda files: None)
    refresh.write_back(lambda path: now)
    refresh.close()
    assert log.read_bytes() == expected


def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    with refreshing(copied(tmp_path / "f", "/f")):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
