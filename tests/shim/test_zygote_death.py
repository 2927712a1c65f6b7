"""The zygote's death, or its child's, at each step of a start: one server, one answer, in time.

A FIFO in a file's place holds the child where it opens it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from shim_harness import wait_until
from zygote_harness import (
    Background,
    Zygote,
    address_of,
    bootstrap,
    children,
    delete_words,
    in_folder,
    only_server,
    parent,
    server_pid,
    shims,
    sockets,
    start,
    start_words,
    state,
)

from vmcell_protos.zygote import ALIVE
from vmcell_shim.zygote_stub import TAKEN_WITHIN_S

pytestmark = pytest.mark.root

# What a direct run may take beside the deadline, on a machine with other things to do.
DIRECT_S = 3.0


def test_there_is_none(zygote: Zygote, bundle: Path) -> None:
    zygote.kill()
    os.unlink(zygote.path)
    address = start(zygote, bundle)
    assert server_pid(address) != only_server(bundle, address)


def test_killed_it_leaves_a_dead_socket_and_the_next_replaces_it(
    zygote: Zygote, bundle: Path
) -> None:
    zygote.kill()
    address = start(zygote, bundle)
    assert server_pid(address) != only_server(bundle, address)
    zygote.start()
    assert zygote.hello().number == zygote.pid


@pytest.mark.parametrize("action", ["start", "delete"])
def test_hanging_it_is_given_up_in_time(zygote: Zygote, bundle: Path, action: str) -> None:
    words = start_words(bundle) if action == "start" else delete_words(bundle)
    with zygote.paused():
        began = time.monotonic()
        done = zygote.run(bundle, *words, stdin=bootstrap(bundle) if action == "start" else b"")
        elapsed_s = time.monotonic() - began
        assert (done.returncode, done.stderr) == (0, b"")
        assert TAKEN_WITHIN_S <= elapsed_s < TAKEN_WITHIN_S + DIRECT_S
        servers = shims(bundle)
        assert len(servers) == (action == "start")
    # What it finds when it goes on is nobody's any more.
    assert zygote.hello().kind == ALIVE
    assert shims(bundle) == servers
    assert children(zygote.pid) == []


def test_killed_before_it_looks(zygote: Zygote, bundle: Path) -> None:
    """The request stands in its queue; the end of the socket is noticed at once."""
    with zygote.paused():
        call = Background(zygote, bundle, *start_words(bundle), stdin=bootstrap(bundle))
        wait_until(lambda: pending(zygote.path) == 1, "the request")
        zygote.kill()
        address = address_of(call.result())
    assert server_pid(address) != only_server(bundle, address)


def pending(path: str) -> int:
    """How many connections wait in the queue of the socket at `path`."""
    text = subprocess.run(
        ["ss", "-xlH"], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    folder = os.path.dirname(path)
    return sum(int(line.split()[2]) for line in text.splitlines() if folder in line)


class HeldChild:
    """A start whose child has come to `step` and waits there: "reading" its bundle, or "answering",
    when its socket listens already. The direct path finds nothing to wait for."""

    def __init__(self, zygote: Zygote, bundle: Path, step: str) -> None:
        self._step = step
        self._fifo = bundle / "held"
        config = bundle / "config.json"
        config.unlink()
        os.mkfifo(config)
        self.call = Background(zygote, bundle, *start_words(bundle), stdin=bootstrap(bundle))
        wait_until(lambda: len(shims(bundle)) == 1, "a child in the bundle")
        (self.pid,) = shims(bundle)
        assert parent(self.pid) == zygote.pid
        if step == "reading":
            self._writer = os.open(config, os.O_WRONLY)
        else:
            os.mkfifo(bundle / f".address.{self.pid}")
            os.link(bundle / f".address.{self.pid}", self._fifo)
            config.write_text("{}")
            wait_until(lambda: sockets(bundle) != [], "the child's socket")
        plain = bundle / "plain"
        plain.write_text("{}")
        plain.rename(config)

    def go_on(self) -> None:
        """Lets the child pass."""
        if self._step == "reading":
            os.write(self._writer, b"{}")
            os.close(self._writer)
        else:
            with self._fifo.open() as reader:
                assert reader.read().startswith("unix://")


STEPS = pytest.mark.parametrize("step", ["reading", "answering"])


@STEPS
def test_killed_after_the_fork_it_is_not_missed(zygote: Zygote, bundle: Path, step: str) -> None:
    held = HeldChild(zygote, bundle, step)
    zygote.kill()
    held.go_on()
    address = address_of(held.call.result())
    assert server_pid(address) == held.pid
    assert shims(bundle) == [held.pid]


@STEPS
def test_a_child_killed_is_replaced_by_the_direct_path(
    zygote: Zygote, bundle: Path, step: str
) -> None:
    """Also the child of a zygote that is gone itself."""
    held = HeldChild(zygote, bundle, step)
    if step == "answering":
        zygote.kill()
    os.kill(held.pid, signal.SIGKILL)
    address = address_of(held.call.result())
    assert server_pid(address) != only_server(bundle, address) != held.pid


@STEPS
def test_a_child_that_hangs_gives_up_and_is_replaced(
    zygote: Zygote, bundle: Path, step: str
) -> None:
    """It ends before it is given up, so that nobody is sent to a socket that dies."""
    held = HeldChild(zygote, bundle, step)
    address = address_of(held.call.result())
    assert state(held.pid) in ("", "Z")
    assert server_pid(address) != only_server(bundle, address)


@STEPS
def test_a_start_whose_caller_has_gone_is_found_by_the_next(
    zygote: Zygote, bundle: Path, step: str
) -> None:
    """containerd killed it, or the answer was lost: one server, and its address is told."""
    held = HeldChild(zygote, bundle, step)
    (stub,) = [pid for pid in in_folder(bundle) if pid != held.pid]
    os.kill(stub, signal.SIGKILL)
    assert held.call.result().returncode == -signal.SIGKILL
    held.go_on()
    wait_until(lambda: sockets(bundle) != [], "its socket")
    address = start(zygote, bundle)
    assert server_pid(address) == held.pid
    wait_until(lambda: shims(bundle) == [held.pid], "the end of the child that found it")


def test_a_caller_that_hangs_up_before_the_fork_gets_no_child(zygote: Zygote, bundle: Path) -> None:
    with zygote.paused():
        call = Background(zygote, bundle, *start_words(bundle), stdin=bootstrap(bundle))
        wait_until(lambda: pending(zygote.path) == 1, "the request")
        (stub,) = in_folder(bundle)
        os.kill(stub, signal.SIGKILL)
        call.result()
    assert zygote.hello().kind == ALIVE
    assert (children(zygote.pid), sockets(bundle)) == ([], [])


def test_shims_outlive_it(zygote: Zygote, bundle: Path) -> None:
    address = start(zygote, bundle)
    pid = server_pid(address)
    zygote.kill()
    assert server_pid(address) == pid
    assert start(zygote, bundle) == address, "found by the direct path"
    assert shims(bundle) == [pid]


def test_sigterm_ends_it_and_its_socket_but_not_its_shims(zygote: Zygote, bundle: Path) -> None:
    address = start(zygote, bundle)
    zygote.signal(signal.SIGTERM)
    assert zygote.wait() == 0
    assert not os.path.exists(zygote.path)
    assert shims(bundle) == [server_pid(address)]
