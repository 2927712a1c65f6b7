"""A Checkpoint and other calls at the same time; and that nothing of many is left."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable

import pytest
from fake_vmm import FakeVmm
from shim_harness import Shim, refused, wait_until
from snapshot_calls import (
    checkpoint,
    end,
    made,
    opened,
    pause,
    restore,
    resume,
    save,
    snapshots,
    start,
)

from vmcell_protos import task
from vmcell_protos.errors import VmcellError


class Gate:
    """A save that has come to the VMM's part and waits there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        original = FakeVmm.save

        def held(vmm: FakeVmm, memory_fd: int, state_fd: int) -> int:
            self.reached.set()
            assert self.opened.wait(20)
            return original(vmm, memory_fd, state_fd)

        monkeypatch.setattr(FakeVmm, "save", held)


class InBackground:
    """One call, whose outcome is asked for later."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(act,))
        self._thread.start()

    def _run(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - given to whoever asks
            self.error = error

    def result(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


def test_what_is_asked_while_it_is_saved(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    start(shim)
    saving = InBackground(lambda: save(shim))
    assert gate.reached.wait(20)
    assert shim.state().status == task.TaskStatus_PAUSING
    for act in (
        lambda: save(shim, "s2"),
        lambda: pause(shim),
        lambda: resume(shim),
        lambda: shim.add_exec("e1", "/bin/true"),
        shim.delete,
    ):
        with refused("failed_precondition"):
            act()
    shim.kill(15)
    gate.opened.set()
    saving.result()
    assert shim.wait() == 143
    shim.delete()
    assert snapshots(shim) == ["s1"]


def test_killed_while_it_is_saved(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    start(shim)
    saving = InBackground(lambda: save(shim))
    assert gate.reached.wait(20)
    shim.kill(9)
    assert shim.wait() == 137
    shim.delete()
    gate.opened.set()
    with pytest.raises(VmcellError):
        saving.result()
    assert snapshots(shim) == []
    assert shim.left_behind() == []
    shim.containerd.wait_topics("create", "start", "exit", "delete")


ALLOWED = {"failed_precondition", "not_found", "unavailable", "internal", "resource_exhausted"}


@pytest.mark.parametrize("seed", range(6))
def test_all_at_once(shim: Shim, seed: int) -> None:
    """Whatever comes first: one exit, one delete, nothing left but whole snapshots."""
    start(shim)
    unexpected: list[BaseException] = []
    barrier = threading.Barrier(6)

    def repeat(act: Callable[[int], object]) -> None:
        barrier.wait()
        for number in range(8):
            try:
                act(number)
            except VmcellError as error:
                if error.code not in ALLOWED or "Traceback" in str(error):
                    unexpected.append(error)
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                unexpected.append(error)

    def kill_later(number: int) -> None:
        if number == seed + 1:
            shim.kill(9)
        else:
            shim.state()

    acts: list[Callable[[int], object]] = [
        lambda number: save(shim, f"a{number}"),
        lambda number: save(shim, f"b{number}", then="pause"),
        lambda number: pause(shim),
        lambda number: resume(shim),
        kill_later,
        lambda number: shim.delete(),
    ]
    threads = [threading.Thread(target=repeat, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert unexpected == []
    if shim.registry.find("c1") is not None:
        if shim.state().status != task.TaskStatus_STOPPED:
            shim.kill(9)
        assert shim.wait() == 137
        shim.delete()
    assert shim.left_behind() == []
    topics = shim.containerd.topics
    wait_until(lambda: topics()[-1] == "delete", f"a delete behind {topics()}")
    found = topics()
    assert (found.count("exit"), found.count("delete")) == (1, 1)
    assert found[:2] == ["create", "start"]
    assert found[-2:] == ["exit", "delete"]
    assert all(one != two for one, two in itertools.pairwise(found))
    for name in snapshots(shim):
        with opened(name):
            pass


# ---- leaks --------------------------------------------------------------------------------------


def test_nothing_leaks(shim: Shim, other: Shim) -> None:
    def cycle(number: int) -> None:
        start(shim)
        save(shim, f"s{number}", then="pause" if number % 2 else "run")
        directory = made(shim, f"image{number}")
        checkpoint(shim, path=directory)
        end(shim)
        restore(other, shim, f"s{number}")
        other.start(container_id="c2")
        end(other, "c2")
        restore(other, shim, "", checkpoint=directory)
        other.start(container_id="c2")
        end(other, "c2")
        with pytest.raises(VmcellError):
            restore(other, shim, "missing")

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    cycle(0)
    settled = held()
    deadline = time.monotonic() + 60
    for number in range(1, 6):
        cycle(number)
    wait_until(lambda: held() <= settled, f"an end of {held()}", deadline - time.monotonic())
    assert shim.left_behind() == []
    assert snapshots(shim) == [f"s{number}" for number in range(6)]
