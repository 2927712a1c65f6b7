"""The VMM process from the shim's side: its end reasons, its failures, nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from payload import (
    HLT_FOREVER,
    JUMP_OUT_OF_MEMORY,
    RESET,
    SPIN,
    TRIPLE_FAULT,
    in8,
    load32,
    out8,
    say,
    store32,
)
from thread_stacks import stacks_of_default_size
from vmm_bench import DEADLINE_S, Bench, processor_ticks, vmm_bench

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime import handle as handle_module
from vmcell_runtime.config import BlkConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import launch, spawn
from vmcell_runtime.kvm.host_kind import require_linux_host

pytestmark = pytest.mark.kvm


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with vmm_bench(tmp_path) as bench:
        yield bench


@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        (RESET + HLT_FOREVER, "guest_reset", "reset line"),
        (TRIPLE_FAULT, "triple_fault", "double fault"),
        (JUMP_OUT_OF_MEMORY, "guest_fault", "could not emulate an instruction"),
        (
            say(b"[ 1.0] Kernel panic - not syncing: ouch\n") + RESET + HLT_FOREVER,
            "guest_panic",
            "Kernel panic - not syncing: ouch",
        ),
        (
            say(b"Kernel panic - not syncing: hangs\n") + HLT_FOREVER,
            "guest_panic",
            "Kernel panic - not syncing: hangs",
        ),
        (say(b"reboot: Restarting system\n") + RESET, "guest_shutdown", "Restarting system"),
        (say(b"reboot: Power down\n") + HLT_FOREVER, "guest_shutdown", "Power down"),
    ],
    ids=[
        "reset",
        "triple-fault",
        "no-memory",
        "panic",
        "panic-without-reset",
        "restart",
        "power-off",
    ],
)
def test_a_guests_end_has_its_reason(bench: Bench, code: bytes, reason: str, detail: str) -> None:
    ended = bench.launch(code).wait_exit(DEADLINE_S)
    assert ended.reason == reason
    assert detail in ended.detail
    assert f"ended: {reason}" in bench.log


def test_no_stack_of_a_thread_has_room_for_a_huge_page(bench: Bench) -> None:
    running = bench.launch(say(b"x\n") + HLT_FOREVER, vcpu_count=4)
    bench.wait_console(bool)
    assert len(os.listdir(f"/proc/{running.pid}/task")) > 4
    assert stacks_of_default_size(running.pid) == 0


def test_a_killed_vmm_says_so(bench: Bench) -> None:
    running = bench.launch(SPIN)
    with pytest.raises(TimeoutError):
        running.wait_exit(0.05)
    running.kill()
    ended = running.wait_exit(DEADLINE_S)
    assert ended == ("killed", "signal 9 ended the VMM")
    running.kill()
    assert running.wait_exit(0) == ended


SURPRISES = {
    "vcpu": "import vmcell_runtime.vcpu as v; v.VcpuThread._io = lambda self: 1 // 0",
    "loop": "import vmcell_runtime.ending as e; e.Ending._wait_for_reset = lambda self: 1 // 0",
}


@pytest.mark.parametrize("thread", SURPRISES)
def test_an_exception_in_any_thread_ends_the_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    broken = handle_module._BOOTSTRAP.replace("; main(", f"; {SURPRISES[thread]}; main(")
    monkeypatch.setattr(handle_module, "_BOOTSTRAP", broken)
    running = bench.launch(say(b"Kernel panic - not syncing: x\n") + SPIN)
    ended = running.wait_exit(DEADLINE_S)
    assert ended.reason == "vmm_error"
    assert "ZeroDivisionError" in ended.detail
    assert "Traceback" in bench.log


def test_an_exception_ends_the_process_where_the_log_is_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = handle_module._BOOTSTRAP.replace("; main(", f"; {SURPRISES['vcpu']}; main(")
    monkeypatch.setattr(handle_module, "_BOOTSTRAP", broken)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, bench.log_fd)
    os.close(full)
    ended = bench.launch(say(b"x") + SPIN).wait_exit(DEADLINE_S)
    assert ended.reason == "vmm_error"
    assert "ZeroDivisionError" in ended.detail


def test_a_shim_that_talks_nonsense_ends_the_vmm(bench: Bench) -> None:
    running = bench.launch(SPIN)
    running._sock.send(b"nonsense")
    ended = running.wait_exit(DEADLINE_S)
    assert ended.reason == "vmm_error"
    assert "CallerError" in ended.detail


LIARS = {
    "nonsense": "import socket, time; s = socket.socket(fileno={fd}); s.send(b'lies'); ",
    "silence": "import os, time; os.close({fd}); ",
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_vmm_that_does_not_speak_is_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, liar: str
) -> None:
    monkeypatch.setattr(handle_module, "_BOOTSTRAP", LIARS[liar] + "time.sleep(60) # {roots}")
    monkeypatch.setattr(handle_module, "CLOSE_TIMEOUT_S", 0.2)
    with pytest.raises(HostError, match=r"did not start and ended: killed|could not be asked"):
        bench.launch(SPIN)


def test_a_vmm_that_dies_at_once_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_module, "_BOOTSTRAP", "raise SystemExit(3) # {fd} {roots}")
    with pytest.raises(HostError, match=r"VMM \d+ (did not start|could not be asked)"):
        bench.launch(SPIN)


def test_the_vmm_ends_when_its_shims_socket_closes(bench: Bench) -> None:
    running = bench.launch(SPIN)
    start = time.monotonic()
    running.close()
    assert time.monotonic() - start < handle_module.CLOSE_TIMEOUT_S
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)
    running.close()


def test_a_killed_shim_takes_its_vmm_with_it(tmp_path: Path) -> None:
    program = tmp_path / "shim.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import os, sys, time
            sys.path[:0] = {sys.path!r}
            from payload import SPIN, elf, memory_file
            from vmcell_runtime.config import MachineConfig
            from vmcell_runtime.handle import launch
            config = MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0)
            print(launch(config, [memory_file(elf(SPIN))], log_fd=2).pid, flush=True)
            time.sleep(60)
            """
        )
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as shim:
        assert shim.stdout is not None
        vmm = os.pidfd_open(int(shim.stdout.readline()))
        shim.kill()
        # a pidfd of somebody else's child becomes readable at its end
        readable, _, _ = select.select([vmm], [], [], DEADLINE_S)
    os.close(vmm)
    assert readable


def test_the_vmm_has_no_descriptor_it_was_not_given(bench: Bench) -> None:
    stray, other = os.pipe()
    os.set_inheritable(stray, True)
    running = bench.launch(SPIN)
    links = {
        os.readlink(entry) for entry in Path(f"/proc/{running.pid}/fd").iterdir() if entry.exists()
    }
    assert os.readlink(f"/proc/self/fd/{stray}") not in links
    assert "/dev/kvm" not in links, "only the VM and its vCPUs stay open"
    assert any("kvm-vm" in link for link in links)
    os.close(stray)
    os.close(other)


def test_the_console_reaches_its_file_as_it_comes(bench: Bench) -> None:
    bench.launch(say(b"\x1b[1mraw\x00\nno end") + RESET + HLT_FOREVER).wait_exit(DEADLINE_S)
    assert bench.console == b"\x1b[1mraw\x00\nno end"


def test_unclaimed_addresses_read_as_ones_and_are_counted(bench: Bench) -> None:
    code = in8(0x2F8) + b"\x66\xba\xf8\x03\xee" + out8(0x2F8, 1) + RESET + HLT_FOREVER
    bench.launch(code).wait_exit(DEADLINE_S)
    assert bench.console == b"\xff"
    assert "unclaimed_port_reads=1 unclaimed_port_writes=1" in bench.log


def test_an_access_across_two_pages_comes_in_odd_pieces(bench: Bench) -> None:
    """KVM cuts it where the page ends: 3 bytes, then 1."""
    code = load32(0x2000_0FFD) + store32(0x2000_0FFD, 7) + RESET + HLT_FOREVER
    ended = bench.launch(code).wait_exit(DEADLINE_S)
    assert ended.reason == "guest_reset", ended
    assert "unclaimed_memory_reads=2 unclaimed_memory_writes=2" in bench.log


@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_vcpus_and_memory_above_4_gib(bench: Bench, vcpus: int) -> None:
    running = bench.launch(RESET + HLT_FOREVER, vcpu_count=vcpus, memory_mib=4096)
    assert running.wait_exit(DEADLINE_S).reason == "guest_reset"


def test_a_halted_guest_costs_no_processor_time(bench: Bench) -> None:
    running = bench.launch(say(b"halting\n") + HLT_FOREVER)
    deadline = time.monotonic() + DEADLINE_S
    while b"halting" not in bench.console and time.monotonic() < deadline:
        time.sleep(0.01)
    before = processor_ticks(running.pid)
    with pytest.raises(TimeoutError):
        running.wait_exit(1)
    assert processor_ticks(running.pid) - before <= os.sysconf("SC_CLK_TCK") // 20


def launch_kernel(bench: Bench, fd: int) -> None:
    config = MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0)
    launch(config, [fd], log_fd=bench.log_fd)


def bad_kernel(bench: Bench) -> None:
    with tempfile.TemporaryFile() as file:
        launch_kernel(bench, file.fileno())


def empty_image(bench: Bench) -> None:
    with tempfile.TemporaryFile() as file:
        bench.launch(SPIN, file.fileno(), pmem=(PmemConfig(descriptor=2),))


def writable_disk_opened_read_only(bench: Bench) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4096)
        fd = os.open(file.name, os.O_RDONLY)
        try:
            bench.launch(SPIN, fd, blk=(BlkConfig(descriptor=2),))
        finally:
            os.close(fd)


def unknown_descriptor(bench: Bench) -> None:
    bench.launch(SPIN, pmem=(PmemConfig(descriptor=7),))


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (bad_kernel, "not a 64-bit ELF file"),
        (empty_image, "a pmem image has 0 bytes"),
        (writable_disk_opened_read_only, "not opened O_RDWR"),
        (unknown_descriptor, "descriptor 7 is named, but only 2 came along"),
    ],
)
def test_a_machine_that_cannot_be_made_is_one_clear_error(
    bench: Bench, attempt: Callable[[Bench], None], sentence: str
) -> None:
    with pytest.raises(CallerError, match=sentence) as raised:
        attempt(bench)
    assert "\n" not in str(raised.value)


def test_a_kernel_that_cannot_be_read_is_the_hosts_error(bench: Bench) -> None:
    with pytest.raises(HostError, match="reading the kernel failed: Bad file descriptor"):
        launch_kernel(bench, bench.console_fd)


@pytest.mark.parametrize("device", [True, False], ids=["kvm_pvm", "no-kvm"])
def test_a_host_that_cannot_run_linux_is_refused_before_anything_starts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: bool
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "sys/module/kvm_pvm").mkdir(parents=True)
    if device:
        (tmp_path / "dev/kvm").touch()
    refuse = partial(require_linux_host, str(tmp_path))
    monkeypatch.setattr(handle_module, "require_linux_host", refuse)
    config = MachineConfig(vcpu_count=1, memory_mib=64, kernel_descriptor=0)
    with pytest.raises(HostError, match="vmcell doctor"):
        spawn(config, [bench.console_fd], log_fd=bench.log_fd)
    assert bench.log == "", "no process was started"


def test_sockets_to_a_guest_without_a_driver(bench: Bench) -> None:
    running = bench.launch(SPIN, vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)))
    with pytest.raises(HostError, match="no driver yet"):
        running.connect_vsock(1025)
    prepared, later = running.accept_vsock(1024), running.accept_vsock(1024)
    running.kill()
    running.wait_exit(DEADLINE_S)
    for sock in (prepared, later):
        sock.settimeout(DEADLINE_S)
        assert sock.recv(1) == b"", "the end of the VMM is the end of its streams"
        sock.close()
    for attempt in (running.connect_vsock, running.accept_vsock):
        with pytest.raises(HostError, match="ended: killed"):
            attempt(1)


def test_twenty_machines_at_once(bench: Bench) -> None:
    running = [bench.launch(say(b"x") + RESET + HLT_FOREVER) for _ in range(20)]
    assert {vmm.wait_exit(DEADLINE_S).reason for vmm in running} == {"guest_reset"}
    assert len({vmm.pid for vmm in running}) == 20


def test_the_handles_signal_is_not_the_childs(bench: Bench) -> None:
    """The VMM has a session of its own: what a terminal sends to the shim does not reach it."""
    running = bench.launch(SPIN)
    assert os.getsid(running.pid) == running.pid != os.getsid(0)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait_exit(DEADLINE_S) == ("killed", "signal 15 ended the VMM")
