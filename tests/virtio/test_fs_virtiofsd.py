"""The file system device with a real virtiofsd, and what a guest gets when that one dies."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuse_client import INIT, ROOT, FuseClient
from guest_driver import RAM_BYTES, GuestDriver
from turning_loop import TurningLoop

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio.fs import Fs
from vmcell_runtime.virtio.vhost_user import FrontEnd
from vmcell_tools.dev_qemu import VIRTIOFSD_PATHS

pytestmark = pytest.mark.root


@dataclass
class Served:
    """A driver whose device is served by `daemon` from `directory`."""

    driver: GuestDriver
    client: FuseClient
    daemon: subprocess.Popen[bytes]
    directory: Path
    call_fd: int


def start_daemon(directory: Path, path: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    program = next(path for path in VIRTIOFSD_PATHS if os.path.exists(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(path))
        words = [program, f"--fd={listener.fileno()}"]
        words += ["-o", f"source={directory}", "-o", "sandbox=chroot"]
        daemon = subprocess.Popen(words, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    return daemon, sock


@pytest.fixture
def served(tmp_path: Path, loop: TurningLoop) -> Iterator[Served]:
    directory = tmp_path / "shared"
    directory.mkdir()
    memory = GuestMemory(RAM_BYTES, shared=True)
    daemon, sock = start_daemon(directory, tmp_path / "socket")
    call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    lines: list[str] = []
    device = Fs(memory, loop, FrontEnd(sock), call_fd, tag="vmcell", report=lines.append)
    driver = GuestDriver(device, memory, loop)
    driver.reports = lines
    driver.start()
    try:
        yield Served(driver, FuseClient(driver), daemon, directory, call_fd)
    finally:
        driver.close()
        daemon.kill()
        daemon.wait()
        os.close(call_fd)
        memory.close()


def test_files_pass_both_ways(served: Served) -> None:
    client = served.client
    assert client.init()[0] == 7
    (served.directory / "deep").mkdir()
    (served.directory / "deep/hello").write_bytes(b"from the host")
    assert client.read_file("deep/hello") == b"from the host"
    client.write_file(client.walk("deep"), "answer", b"from the guest")
    assert (served.directory / "deep/answer").read_bytes() == b"from the guest"
    assert not client.exists(ROOT, "nothing")
    assert os.eventfd_read(served.call_fd) > 0, "the daemon interrupts the guest itself"


def test_a_driver_may_begin_again(served: Served) -> None:
    assert served.client.init()[0] == 7
    (served.directory / "file").write_bytes(b"1")
    for _ in range(3):
        served.driver.start()
        served.client = FuseClient(served.driver)
        served.client.init()
        assert served.client.read_file("file") == b"1"
    assert not served.driver.reports


def test_after_the_daemons_death_requests_are_refused(served: Served) -> None:
    served.client.init()
    served.daemon.send_signal(signal.SIGSTOP)
    waiting = served.client.send(INIT, 0, bytes(16))
    served.daemon.kill()
    served.daemon.wait()
    with pytest.raises(OSError) as raised:
        served.client.reply(waiting)
    assert raised.value.errno == errno.ENOTCONN
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            served.client.lookup(ROOT, "file")
        assert raised.value.errno == errno.ENOTCONN
        served.driver.start()
        served.client = FuseClient(served.driver)
    assert len(served.driver.reports) == 1
    assert "the vhost-user daemon has ended" in served.driver.reports[0]
    assert not served.driver.needs_reset
