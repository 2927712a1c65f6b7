"""Real commands in one sandbox outlive every part of the service but nginx; a kill ends them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from dev_vm import DevVm
from e2b import Sandbox
from e2b.exceptions import SandboxException, TimeoutException

from vmcell_tools.dev_service import create_key, start_service, stop_service

pytestmark = pytest.mark.vm

PATIENCE_S = 300
COMMANDS = 20
AT_ONCE = 2


@pytest.fixture(scope="module")
def service(dev_vm: DevVm) -> Iterator[DevVm]:
    start_service(dev_vm.api_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2B_API_URL", dev_vm.api_url)
        patch.setenv("E2B_SANDBOX_URL", dev_vm.sandbox_url)
        patch.setenv("E2B_API_KEY", create_key("ingress"))
        yield dev_vm
    stop_service()


def _pid(service: DevVm, part: str) -> str:
    found = re.findall(rf"{part} is process (\d+)", (service.out / "serve.log").read_text())
    return str(found[-1])


def _kill(service: DevVm, part: str) -> None:
    """SIGKILL for the part and its workers; returns when another is there."""
    pid = _pid(service, part)
    service.check("sh", "-c", f"kill -9 $(pgrep -P {pid}) {pid}")
    _until(lambda: _pid(service, part) != pid, f"{part} was not started again")


def _until(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.2)


def _lists(sandbox_id: str) -> bool:
    try:
        return sandbox_id in {info.sandbox_id for info in Sandbox.list().next_items()}
    except (SandboxException, ConnectionError, TimeoutError):
        return False


def _is_reached(sandbox: Sandbox) -> bool:
    try:
        return sandbox.is_running(request_timeout=PATIENCE_S)
    except (SandboxException, ConnectionError, TimeoutError):
        return False


def test_twenty_commands_outlive_the_service(service: DevVm) -> None:
    sandbox = Sandbox.create(template="base", timeout=900, request_timeout=PATIENCE_S)
    sandbox.commands.run("mkfifo /tmp/go", timeout=PATIENCE_S)
    outputs: list[list[str]] = [[] for _ in range(COMMANDS)]
    ends: list[object] = [None] * COMMANDS

    def follow(number: int) -> None:
        try:
            done = sandbox.commands.run(
                f"echo up; cat < /tmp/go; echo after {number}",
                on_stdout=outputs[number].append,
                timeout=0,
                request_timeout=PATIENCE_S,
            )
            ends[number] = done.exit_code
        except (SandboxException, TimeoutException) as error:
            ends[number] = error

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(COMMANDS)]
    # Not all at once: some of 20 connections that came together were reset by the forwarded port.
    for number, thread in enumerate(threads, 1):
        thread.start()
        if number % AT_ONCE == 0:
            _until(lambda: all(outputs[:number]), "the commands did not start")  # noqa: B023
    for part in ("the API", "the router", "noded"):
        _kill(service, part)
    _until(lambda: _lists(sandbox.sandbox_id), "the sandbox is not listed")
    _until(lambda: _is_reached(sandbox), "no new request passes the router")
    assert ends == [None] * COMMANDS
    sandbox.commands.run(": > /tmp/go", timeout=PATIENCE_S)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert ends == [0] * COMMANDS
    assert ["".join(parts) for parts in outputs] == [f"up\nafter {n}\n" for n in range(COMMANDS)]

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(2)]
    for parts in outputs:
        parts.clear()
    for thread in threads:
        thread.start()
    _until(lambda: all(outputs[:2]), "the commands did not start")
    sandbox.set_timeout(1)
    for thread in threads:
        thread.join(60)
    assert all(isinstance(end, TimeoutException) for end in ends[:2]), ends[:2]
    assert not sandbox.is_running(request_timeout=PATIENCE_S)
