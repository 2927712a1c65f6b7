"""The zygote's renewal: the same process, another layout, and no start that notices."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from shim_harness import wait_until
from zygote_harness import (
    ONLY_BY_ZYGOTE,
    Zygote,
    children,
    delete_words,
    end,
    make_bundle,
    only_server,
    parent,
    server_pid,
    shims,
    start,
    state,
    traits,
    variant,
)

pytestmark = pytest.mark.root


def renew(zygote: Zygote) -> None:
    """By SIGHUP; it and nothing else serves when this returns."""
    before = zygote.log.read_text().count("renewed")
    zygote.signal(signal.SIGHUP)
    wait_until(lambda: zygote.log.read_text().count("renewed") > before, "the renewal")
    wait_until(lambda: children(zygote.pid) == [], "the stand-in's end")


def layout(pid: int) -> str:
    """Where its stack is; "" in the middle of an exec."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next((line for line in lines if line.endswith("[stack]")), "").split("-")[0]


def test_renewed_it_is_the_same_process_with_another_layout(zygote: Zygote) -> None:
    before = layout(zygote.pid), zygote.descriptors(), traits(zygote.pid)
    pid = zygote.pid
    renew(zygote)
    assert zygote.hello().number == pid
    after = layout(pid), zygote.descriptors(), traits(pid)
    assert after[0] != before[0]
    assert len(after[1]) == len(before[1])
    assert after[2] == before[2]
    zygote.signal(signal.SIGTERM)
    assert zygote.wait() == 0


def test_a_stop_in_the_middle_of_a_renewal_is_obeyed(zygote: Zygote) -> None:
    for _ in range(5):
        zygote.signal(signal.SIGHUP)
        zygote.signal(signal.SIGTERM)
        assert zygote.wait() == 0
        zygote.start()


def halt_in_renewal(zygote: Zygote) -> int:
    """Stops the zygote between its exec and its readiness; the stand-in's pid."""
    for _ in range(10):
        old = layout(zygote.pid)
        zygote.signal(signal.SIGHUP)
        wait_until(lambda old=old: layout(zygote.pid) not in ("", old), "the exec")
        zygote.signal(signal.SIGSTOP)
        wait_until(lambda: state(zygote.pid) == "T", "the stop")
        if stand_ins := children(zygote.pid):
            return stand_ins[0]
        zygote.signal(signal.SIGCONT)  # it has been quicker
        zygote.hello()
    pytest.fail("no stand-in was seen in ten renewals")


def test_while_it_is_renewed_a_stand_in_serves(zygote: Zygote, bundle: Path, folder: Path) -> None:
    """The zygote stands still right after its exec, and nobody notices."""
    binary = variant(folder / "only", ONLY_BY_ZYGOTE)
    stand_in = halt_in_renewal(zygote)
    address = start(zygote, bundle, binary)
    assert parent(server_pid(address)) == stand_in
    zygote.signal(signal.SIGCONT)
    wait_until(lambda: state(stand_in) in ("", "Z"), "the stand-in's end")
    assert zygote.hello().number == zygote.pid
    assert shims(bundle) == [server_pid(address)]
    assert zygote.run(bundle, *delete_words(bundle), binary=binary).returncode == 0


def test_a_stand_in_ends_with_the_zygote(zygote: Zygote, bundle: Path) -> None:
    stand_in = halt_in_renewal(zygote)
    zygote.kill()
    wait_until(lambda: state(stand_in) in ("", "Z"), "the stand-in's end")
    address = start(zygote, bundle)
    assert server_pid(address) != only_server(bundle, address)


@pytest.mark.timeout(600)
@pytest.mark.deep
def test_three_hundred_starts_across_renewals(zygote: Zygote, folder: Path) -> None:
    """Eight at a time, each with its delete: every one is answered once, and nothing is left."""
    before = zygote.descriptors()
    ways: list[bool] = []
    errors: list[object] = []

    def work(worker: int) -> None:
        for turn in range(300 // 8 + 1):
            made = make_bundle(folder, f"b{worker}-{turn}")
            try:
                address = start(zygote, made)
                pid = only_server(made, address)
                ways.append(server_pid(address) == pid)
                end(pid)
                done = zygote.run(made, *delete_words(made))
                assert (done.returncode, done.stderr) == (0, b"")
                assert os.listdir(made / "s") == []
            except BaseException as error:  # noqa: BLE001  shown by the test's own thread
                errors.append(error)
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(500)
    assert errors == []
    assert len(ways) >= 300
    assert zygote.log.read_text().count("renewed") >= 2
    # A busy machine may make one give up on it and go direct; that is no loss.
    assert ways.count(True) > 0.9 * len(ways)
    wait_until(lambda: children(zygote.pid) == [], "no child, and no zombie")
    assert len(zygote.descriptors()) == len(before)
