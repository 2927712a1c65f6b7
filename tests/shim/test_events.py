"""Events: in order, also across a restart of containerd, and by the binary as the last resort."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_harness import FakeContainerd, wait_until

from vmcell_protos.events import TaskExit, TaskStart
from vmcell_protos.wellknown import Any
from vmcell_shim import events
from vmcell_shim.events import EventPublisher
from vmcell_shim.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal("", "test")
    journal.attach(str(tmp_path / "shim.log"))
    yield journal
    journal.close()


def publisher(path: str, journal: Journal, binary: str = "") -> EventPublisher:
    return EventPublisher(
        namespace="test",
        ttrpc_address=path,
        grpc_address="/run/c.sock",
        publish_binary=binary,
        journal=journal,
    )


def test_order_is_kept_across_a_restart(tmp_path: Path, journal: Journal) -> None:
    containerd = FakeContainerd(str(tmp_path / "events.sock"))
    sender = publisher(containerd.path, journal)
    for number in range(10):
        sender.publish(TaskStart(container_id="c1", pid=number + 1))
    assert sender.flush(20)
    containerd.close()
    for number in range(10, 20):
        sender.publish(TaskStart(container_id="c1", pid=number + 1))
    assert not sender.flush(0.2)
    containerd.restart()
    assert sender.flush(20)
    pids = [TaskStart.decode(value).pid for _, _, value in containerd.events]
    assert pids == list(range(1, 21))
    assert containerd.events[0][1] == "containerd.events.TaskStart"
    sender.close()
    containerd.close()


def test_publish_binary_is_the_last_resort(tmp_path: Path, journal: Journal) -> None:
    record = tmp_path / "record"
    binary = tmp_path / "containerd"
    binary.write_text(
        f'#!/bin/sh\necho "$@" > {record}.words\ncat > {record}.new\nmv {record}.new {record}\n'
    )
    binary.chmod(0o755)
    sender = publisher(str(tmp_path / "nobody.sock"), journal, str(binary))
    sender.publish(TaskExit(container_id="c1", id="c1", exit_status=7))
    assert sender.flush(20)
    sender.close()
    words = Path(f"{record}.words").read_text().split()
    assert words == [
        *("--address", "/run/c.sock", "publish", "--topic", "/tasks/exit", "--namespace", "test")
    ]
    event = Any.decode(record.read_bytes())
    assert event.type_url == "containerd.events.TaskExit"
    assert TaskExit.decode(event.value).exit_status == 7


def test_queue_is_bounded(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUEUE_LIMIT", 5)
    containerd = FakeContainerd(str(tmp_path / "events.sock"))
    containerd.close()
    sender = publisher(containerd.path, journal)
    for number in range(8):
        sender.publish(TaskStart(container_id="c1", pid=number + 1))
    containerd.restart()
    assert sender.flush(20)
    pids = [TaskStart.decode(value).pid for _, _, value in containerd.events]
    assert pids[-5:] == [4, 5, 6, 7, 8]
    sender.close()
    containerd.close()
    assert "is lost" in (tmp_path / "shim.log").read_text()


def test_close_gives_up_what_nobody_takes(tmp_path: Path, journal: Journal) -> None:
    sender = publisher(str(tmp_path / "nobody.sock"), journal)
    sender.publish(TaskStart(container_id="c1"))
    sender.close()
    log = (tmp_path / "shim.log").read_text()
    assert "1 events could not be delivered" in log


def test_log_fifo_never_blocks(tmp_path: Path) -> None:
    """Nobody reads, then somebody does, then nobody again."""
    fifo = str(tmp_path / "log")
    os.mkfifo(fifo)
    journal = Journal(fifo, "c1")
    journal.info("lost")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    journal.info('a "quoted"\nline')
    line = os.read(reader, 4096).decode()
    assert line.startswith('time="')
    assert line.endswith('level=info msg="a \\"quoted\\"\\nline" id=c1\n')
    os.close(reader)
    for _ in range(5000):
        journal.info("x" * 100)
    journal.attach(str(tmp_path / "shim.log"))
    wait_until(lambda: "lost" in (tmp_path / "shim.log").read_text(), "the early lines")
    journal.close()
