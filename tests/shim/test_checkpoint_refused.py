"""What cannot be saved, what cannot go on from it, and guests that do not do as they are told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from fake_vmm import FakeVmm
from shim_harness import Shim, refused
from snapshot_calls import (
    ENDLESS,
    end,
    handle,
    made,
    pause,
    restore,
    resume,
    save,
    snapshots,
    start,
)

from vmcell_protos import task
from vmcell_protos.errors import HostError, VmcellError
from vmcell_shim import adoption
from vmcell_shim import guest as guest_module


def test_an_unknown_one(shim: Shim) -> None:
    with refused("not_found"):
        save(shim)


def test_one_that_is_created(shim: Shim) -> None:
    shim.create(*ENDLESS)
    with refused("failed_precondition"):
        save(shim)
    assert snapshots(shim) == []


def test_one_that_has_ended(shim: Shim) -> None:
    start(shim, "/bin/true")
    assert shim.wait() == 0
    with refused("failed_precondition"):
        save(shim)
    assert snapshots(shim) == []
    shim.delete()


def test_one_of_a_pod(shim: Shim) -> None:
    shim.create(*ENDLESS, annotations={"io.containerd.runc.v2.group": "g"})
    shim.start()
    with pytest.raises(VmcellError, match="shares its microVM with the other containers") as caught:
        save(shim)
    assert caught.value.code == "unimplemented"
    assert shim.state().status == task.TaskStatus_RUNNING
    assert snapshots(shim) == []


def test_one_with_live_directories(shim: Shim) -> None:
    mount = {
        "destination": "/live",
        "type": "bind",
        "source": str(made(shim, "live")),
        "options": ["rbind", "rw"],
    }
    start(shim, mounts=[mount])
    with pytest.raises(VmcellError, match="has live directories of the host") as caught:
        save(shim)
    assert caught.value.code == "unimplemented"
    assert shim.state().status == task.TaskStatus_RUNNING


def test_an_id_that_is_taken(shim: Shim) -> None:
    start(shim)
    save(shim)
    with refused("already_exists"):
        save(shim)
    assert shim.state().status == task.TaskStatus_RUNNING
    assert snapshots(shim) == ["s1"]


def in_a_pod(shim: Shim, first: Shim) -> None:
    restore(shim, first, annotations={"io.containerd.runc.v2.group": "g"})


def on_a_terminal(shim: Shim, first: Shim) -> None:
    path = str(first.directory / "tty")
    os.mkfifo(path)
    restore(shim, first, terminal=True, stdout=path)


def with_a_live_directory(shim: Shim, first: Shim) -> None:
    mount = {"destination": "/l", "type": "bind", "source": str(first.directory), "options": ["rw"]}
    restore(shim, first, mounts=[mount])


def on_another_root(shim: Shim, first: Shim) -> None:
    (first.directory / "root/etc/new").write_text("new")
    restore(shim, first)


def with_a_read_only_root(shim: Shim, first: Shim) -> None:
    restore(shim, first, root={"path": str(first.directory / "root"), "readonly": True})


def with_another_base_image(shim: Shim, first: Shim) -> None:
    (first.directory / "base.erofs").write_bytes(b"another")
    restore(shim, first)


def one_that_is_not_there(shim: Shim, first: Shim) -> None:
    restore(shim, first, "s2")


def no_id(shim: Shim, first: Shim) -> None:
    restore(shim, first, "../s1")


def an_empty_checkpoint(shim: Shim, first: Shim) -> None:
    restore(shim, first, "", checkpoint=made(first, "empty"))


def a_checkpoint_that_is_not_there(shim: Shim, first: Shim) -> None:
    restore(shim, first, "", checkpoint=first.directory / "nowhere")


UNFIT: list[tuple[Callable[[Shim, Shim], None], str, str]] = [
    (in_a_pod, "of a pod cannot go on", "unimplemented"),
    (on_a_terminal, "without a terminal, and c2 is to run with one", "failed_precondition"),
    (with_a_live_directory, "with live directories; leave", "unimplemented"),
    (on_another_root, "is of a container of another image", "failed_precondition"),
    (with_a_read_only_root, "has a root that is writable", "failed_precondition"),
    (with_another_base_image, "another version of the base image", "failed_precondition"),
    (one_that_is_not_there, "s2 does not exist on this host", "failed_precondition"),
    (no_id, "is no snapshot's id", "invalid_argument"),
    (an_empty_checkpoint, "manifest.json of snapshot in the checkpoint", "data_loss"),
    (a_checkpoint_that_is_not_there, "manifest.json of snapshot in the", "data_loss"),
]


@pytest.mark.parametrize("row", UNFIT, ids=lambda row: row[0].__name__)
def test_what_cannot_go_on(
    shim: Shim,
    other: Shim,
    monkeypatch: pytest.MonkeyPatch,
    row: tuple[Callable[[Shim, Shim], None], str, str],
) -> None:
    """Refused before there is a VMM, and nothing is left of it."""
    act, word, code = row
    start(shim)
    save(shim)
    end(shim)
    spawned: list[object] = []
    monkeypatch.setattr(guest_module.handle, "spawn", lambda *row, **_: spawned.append(row))
    with pytest.raises(VmcellError, match=word) as caught:
        act(other, shim)
    assert caught.value.code == code
    assert spawned == []
    assert shim.left_behind() == []
    assert snapshots(shim) == ["s1"]


def test_a_size_that_no_microvm_has(
    shim: Shim, other: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whoever writes checkpoint images: the digests are right, the size is not."""
    start(shim)
    save(shim)
    end(shim)
    monkeypatch.setattr(adoption, "MAX_MEMORY_MIB", 63)
    with pytest.raises(VmcellError, match="is of 1 vCPUs and 64 MiB; a microVM has 1 to 8"):
        restore(other, shim)
    assert shim.left_behind() == []


# ---- guests that do not do as they are told ------------------------------------------------------


def misbehave(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> None:
    monkeypatch.setenv("FAKE_BEHAVIOUR", json.dumps(behaviour))


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("kind", ["deny", "silent"])
def test_a_guest_that_does_not_prepare(
    shim: Shim, monkeypatch: pytest.MonkeyPatch, kind: str, paused: bool
) -> None:
    """It goes on as before, running or paused."""
    misbehave(monkeypatch, **{kind: ["PrepareSnapshot"]})
    monkeypatch.setattr(guest_module, "_PREPARE_S", 0.3)
    start(shim)
    if paused:
        pause(shim)
    with pytest.raises(VmcellError, match="PrepareSnapshot"):
        save(shim)
    assert shim.state().status == (task.TaskStatus_PAUSED if paused else task.TaskStatus_RUNNING)
    assert handle(shim).stands_still == paused
    assert snapshots(shim) == []
    if paused:
        resume(shim)
    end(shim)
    assert shim.left_behind() == []


@pytest.mark.parametrize("kind", ["deny", "silent"])
def test_a_guest_that_does_not_go_on(
    shim: Shim, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The call says so, the task is paused, and can be killed."""
    misbehave(monkeypatch, **{kind: ["ResumeGuest"]})
    monkeypatch.setattr(guest_module, "_WAKE_S", 0.3)
    start(shim)
    with pytest.raises(VmcellError, match="ResumeGuest"):
        save(shim)
    assert shim.state().status == task.TaskStatus_PAUSED
    assert snapshots(shim) == []
    with pytest.raises(VmcellError, match="ResumeGuest"):
        resume(shim)
    assert shim.state().status == task.TaskStatus_PAUSED
    end(shim)
    assert shim.left_behind() == []
    shim.containerd.wait_topics("create", "start", "paused", "exit", "delete")


@pytest.mark.parametrize("method", ["Hello", "AdoptContainer"])
@pytest.mark.parametrize("kind", ["deny", "hang_up"])
def test_a_guest_that_is_not_adopted(
    shim: Shim, other: Shim, monkeypatch: pytest.MonkeyPatch, kind: str, method: str
) -> None:
    start(shim)
    save(shim)
    end(shim)
    misbehave(monkeypatch, **{kind: method if kind == "hang_up" else [method]})
    with pytest.raises(VmcellError):
        restore(other, shim)
    assert shim.left_behind() == []
    misbehave(monkeypatch)
    restore(other, shim)
    other.start(container_id="c2")
    end(other, "c2")


def test_a_restored_guest_that_does_not_wake(
    shim: Shim, other: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(shim)
    save(shim)
    end(shim)
    misbehave(monkeypatch, deny=["ResumeGuest"])
    restore(other, shim)
    with pytest.raises(VmcellError, match="ResumeGuest"):
        other.start(container_id="c2")
    assert other.wait(container_id="c2") == 127
    other.delete(container_id="c2")
    assert shim.left_behind() == []


@pytest.mark.parametrize("error", [HostError("no room"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("then", ["run", "pause"])
def test_a_vmm_that_cannot_write(
    shim: Shim, monkeypatch: pytest.MonkeyPatch, then: str, error: Exception
) -> None:
    def fail(*_: object) -> int:
        raise error

    start(shim)
    monkeypatch.setattr(FakeVmm, "save", fail)
    with pytest.raises(VmcellError, match=r"no room|No space left .*; is there room in"):
        save(shim, then=then)
    assert shim.state().status == task.TaskStatus_RUNNING
    assert not handle(shim).stands_still
    assert snapshots(shim) == []
    monkeypatch.undo()


def test_a_vmm_that_does_not_answer_is_not_saved_again(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have its memory on the file of either save: the next would lack what lies between."""

    def late(*_: object) -> int:
        raise HostError("VMM 1 did not save within 300.0 s", code="deadline_exceeded")

    start(shim)
    with monkeypatch.context() as patch:
        patch.setattr(FakeVmm, "save", late)
        with refused("deadline_exceeded"):
            save(shim)
    for _ in range(2):
        with pytest.raises(VmcellError, match="nobody knows what file") as caught:
            save(shim)
        assert caught.value.code == "failed_precondition"
    assert shim.state().status == task.TaskStatus_RUNNING
    assert snapshots(shim) == []
    end(shim)
    assert shim.left_behind() == []


def test_a_full_table_of_descriptors_is_seen_before_it_is_saved(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM that has saved has its memory on the new file: the shim must have that too."""
    real, asked = os.open, []

    def full(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise OSError(24, "Too many open files")
        return real(path, *args, **kwargs)

    start(shim)
    with monkeypatch.context() as patch:
        patch.setattr(guest_module.os, "open", full)
        patch.setattr(FakeVmm, "save", lambda *row: asked.append(row) or 0)
        with pytest.raises(VmcellError, match="Too many open files"):
            save(shim)
    assert asked == []
    save(shim)
    assert snapshots(shim) == ["s1"]
    end(shim)


def test_a_vmm_that_does_not_start_leaves_no_descriptor(
    shim: Shim, other: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise HostError("no process is left")

    start(shim)
    save(shim)
    end(shim)
    monkeypatch.setattr(guest_module.handle, "spawn", fail)
    with pytest.raises(VmcellError, match="no process is left"):
        restore(other, shim)
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert [link for link in links if link.endswith("/s1/memory")] == []


def test_death_of_the_vmm_while_it_is_saved(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: FakeVmm, *_: object) -> int:
        self.kill()
        raise HostError("the VMM has ended")

    start(shim)
    monkeypatch.setattr(FakeVmm, "save", die)
    with pytest.raises(VmcellError, match="has ended"):
        save(shim)
    assert shim.wait() == 137
    shim.delete()
    assert shim.left_behind() == []
    assert snapshots(shim) == []
    assert "paused" not in shim.containerd.topics()
