"""A VMM with a virtio-fs device: its memory is shared, and its daemon may be no good."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from fake_back_end import FakeBackEnd, answer, negotiation
from payload import HLT_FOREVER, RESET, elf, memory_file, say, store32

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.config import FsConfig, MachineConfig
from vmcell_runtime.handle import VmmHandle, launch

pytestmark = pytest.mark.kvm
DEADLINE_S = 30
SPARE_GPA = 0x20_0000


@pytest.fixture
def back_end() -> Iterator[FakeBackEnd]:
    back_end = FakeBackEnd()
    yield back_end
    back_end.front.close()
    back_end.close()


def start(fd: int, console_fd: int, log_fd: int, end: bytes = RESET) -> VmmHandle:
    config = MachineConfig(
        vcpu_count=1,
        memory_mib=64,
        kernel_descriptor=0,
        console_descriptor=1,
        fs=(FsConfig(descriptor=2, tag="vmcell"),),
    )
    kernel_fd = memory_file(elf(store32(SPARE_GPA, 0x5EED) + say(b"ran\n") + end + HLT_FOREVER))
    try:
        return launch(config, [kernel_fd, console_fd, fd], log_fd=log_fd)
    finally:
        os.close(kernel_fd)


def test_a_guest_runs_in_shared_memory(back_end: FakeBackEnd) -> None:
    back_end.say(negotiation())
    with tempfile.TemporaryFile() as console, tempfile.TemporaryFile() as log:
        vmm = start(back_end.front.fileno(), console.fileno(), log.fileno())
        assert vmm.wait_exit(DEADLINE_S).reason == "guest_reset"
        vmm.close()
        assert os.pread(console.fileno(), 100, 0) == b"ran\n"
    assert [got.request for got in back_end.heard()] == [1, 15, 16, 3]


def test_the_memory_of_a_guest_with_a_share_is_a_file(back_end: FakeBackEnd) -> None:
    back_end.say(negotiation())
    with tempfile.TemporaryFile() as console, tempfile.TemporaryFile() as log:
        vmm = start(back_end.front.fileno(), console.fileno(), log.fileno(), HLT_FOREVER)
        with open(f"/proc/{vmm.pid}/maps") as file:
            maps = [line.split() for line in file if "/memfd:guest-ram" in line]
        vmm.close()
    assert [row[1] for row in maps] == ["---s", "rw-s", "---s"], "with guards on both ends"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (answer(1, 0), "knows no protocol features"),
        (b"\xff" * 12, "answered request 1 with request 4294967295"),
    ],
)
def test_a_bad_daemon_fails_the_start(back_end: FakeBackEnd, said: bytes, sentence: str) -> None:
    back_end.say(said)
    with tempfile.TemporaryFile() as file, pytest.raises(HostError, match=sentence):
        start(back_end.front.fileno(), file.fileno(), file.fileno())


def test_a_dead_daemon_fails_the_start(back_end: FakeBackEnd) -> None:
    back_end.end.close()
    with tempfile.TemporaryFile() as file, pytest.raises(HostError, match=r"gone|closed"):
        start(back_end.front.fileno(), file.fileno(), file.fileno())


def test_what_is_no_socket_is_refused() -> None:
    with (
        tempfile.TemporaryFile() as file,
        tempfile.TemporaryFile() as other,
        pytest.raises(CallerError, match=r"fs\.descriptor is no socket"),
    ):
        start(other.fileno(), file.fileno(), file.fileno())
