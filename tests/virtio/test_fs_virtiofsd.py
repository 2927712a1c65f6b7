"""The file system device with a real virtiofsd, and what a guest gets when that one dies."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuse_client import INIT, ROOT, FuseClient, fuse_guest

from vmcell_shim.virtiofsd import Virtiofsd

pytestmark = pytest.mark.root


@dataclass
class Served:
    """A guest that `daemon` serves from `directory`."""

    client: FuseClient
    daemon: Virtiofsd
    directory: Path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    directory = tmp_path / "shared"
    directory.mkdir()
    daemon = Virtiofsd(os.fspath(directory))
    try:
        with fuse_guest(daemon.take_connection()) as client:
            yield Served(client, daemon, directory)
    finally:
        daemon.close()


def test_files_pass_both_ways(served: Served) -> None:
    client = served.client
    assert client.init()[0] == 7
    (served.directory / "deep").mkdir()
    (served.directory / "deep/hello").write_bytes(b"from the host")
    assert client.read_file("deep/hello") == b"from the host"
    client.write_file(client.walk("deep"), "answer", b"from the guest")
    assert (served.directory / "deep/answer").read_bytes() == b"from the guest"
    assert not client.exists(ROOT, "nothing")
    assert not client.driver.irq.count, "the daemon interrupts the guest itself"


def test_a_driver_may_begin_again(served: Served) -> None:
    assert served.client.init()[0] == 7
    (served.directory / "file").write_bytes(b"1")
    for _ in range(3):
        served.client.driver.start()
        client = FuseClient(served.client.driver)
        client.init()
        assert client.read_file("file") == b"1"
    assert not served.client.driver.reports


def test_after_the_daemons_death_requests_are_refused(served: Served) -> None:
    client = served.client
    client.init()
    signal.pidfd_send_signal(served.daemon.server_pidfd, signal.SIGSTOP)
    waiting = client.send(INIT, 0, bytes(16))
    assert served.daemon.kill()
    with pytest.raises(OSError) as raised:
        client.reply(waiting)
    assert raised.value.errno == errno.ENOTCONN
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            client.lookup(ROOT, "file")
        assert raised.value.errno == errno.ENOTCONN
        client.driver.start()
        client = FuseClient(client.driver)
    assert len(client.driver.reports) == 1
    assert "the vhost-user daemon has ended" in client.driver.reports[0]
    assert not client.driver.needs_reset
