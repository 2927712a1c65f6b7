"""Records and processes of dev VMs on the host."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools import dev_vm
from vmcell_tools.dev_state import (
    DevVm,
    ProcessId,
    load,
    locked,
    recorded_processes,
    state_directory,
)


@pytest.fixture(autouse=True)
def _own_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Sockets stand in it, and tmp_path may be too long for them.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="vmcell-") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        yield


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def a_vm(process: ProcessId) -> DevVm:
    directory = state_directory("t")
    directory.mkdir(parents=True, exist_ok=True)
    return DevVm(
        name="t",
        directory=directory,
        qemu=process,
        helpers=(process,),
        ssh_port=1,
        api_port=2,
        data_port=3,
        memory_mib=2048,
        accelerator="tcg",
        ready=True,
        has_store=False,
    )


@pytest.mark.parametrize("name", ["", "-x", "A", "a/b", "..", "a" * 33, "a b"])
def test_names_that_cannot_be_directories_are_refused(name: str) -> None:
    with pytest.raises(CallerError, match="dev VM name"):
        state_directory(name)


def test_a_directory_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "x" * 80)
    with pytest.raises(CallerError, match="XDG_RUNTIME_DIR"):
        state_directory("default")


def test_a_process_is_known_by_its_start(sleeper: subprocess.Popen[bytes]) -> None:
    process = ProcessId.of(sleeper.pid)
    assert process.alive()
    assert not replace(process, start_ticks=process.start_ticks + 1).alive()


def test_ending_waits_until_the_process_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    process = ProcessId.of(sleeper.pid)
    process.end(grace_s=5)
    assert not process.alive()
    assert sleeper.wait(5) == -15
    process.end(grace_s=5)


# Its first thread ends by itself (exit(2), 60 on x86-64), the second goes on.
HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    command = [sys.executable, "-c", HEADLESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as headless:
        assert headless.stdout is not None
        headless.stdout.readline()
        process = ProcessId.of(headless.pid)
        deadline = time.monotonic() + 10
        while ") Z " not in Path(f"/proc/{headless.pid}/stat").read_text():
            assert time.monotonic() < deadline
        assert process.alive()
        process.end(grace_s=5)
        assert not process.alive()
        assert headless.wait(5) == -15


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    command = ["sh", "-c", "trap '' TERM; echo; while :; do sleep 1000; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        ProcessId.of(stubborn.pid).end(grace_s=0.2)
        assert stubborn.wait(5) == -9
        subprocess.run(["pkill", "-KILL", "-s", str(stubborn.pid)], check=False)


def test_a_record_comes_back(sleeper: subprocess.Popen[bytes]) -> None:
    assert load("t") is None
    assert recorded_processes("t") == []
    vm = a_vm(ProcessId.of(sleeper.pid))
    vm.save()
    assert load("t") == vm


@pytest.mark.parametrize("damage", ["{", "{}", '{"qemu": 3, "helpers": []}', "[]"])
def test_a_damaged_record_is_named(damage: str) -> None:
    directory = state_directory("t")
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(damage)
    with pytest.raises(HostError, match="vmcell dev down"):
        load("t")
    with pytest.raises(HostError, match="by hand"):
        recorded_processes("t")


def test_down_ends_the_processes_of_a_record_of_another_version(
    sleeper: subprocess.Popen[bytes],
) -> None:
    vm = a_vm(ProcessId.of(sleeper.pid))
    vm.save()
    path = vm.directory / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(HostError, match="colour"):
        load("t")
    assert dev_vm.down("t")
    assert sleeper.wait(5) == -15
    assert load("t") is None
    assert not dev_vm.down("t")


def test_one_command_at_a_time() -> None:
    entered = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with locked("t", wait_s=1):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(5)
    with pytest.raises(HostError, match="another command"), locked("t", wait_s=0.1):
        pass
    leave.set()
    holder.join()
    with locked("t", wait_s=0.1) as directory:
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_vm_that_is_not_up_is_an_error_with_advice(sleeper: subprocess.Popen[bytes]) -> None:
    with pytest.raises(HostError, match="vmcell dev up --name t"):
        dev_vm.running_vm("t")
    vm = a_vm(ProcessId.of(sleeper.pid))
    vm.save()
    vm.out_directory.mkdir()
    vm.console_log.write_bytes(b"one\r\nlast words\r\n")
    assert dev_vm.running_vm("t") == vm
    vm.qemu.end(grace_s=5)
    with pytest.raises(HostError, match=r"has ended.*\n.*one\nlast words"):
        dev_vm.running_vm("t")
