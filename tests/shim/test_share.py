"""Live directories with a real virtiofsd: what the guest sees, what the host has left."""

from __future__ import annotations

import errno
import gc
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fuse_client import LOOKUP, ROOT, FuseClient, fuse_guest
from silent_fuse import SilentFuse, silent_fuse

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim import mount_calls, share, virtiofsd
from vmcell_shim.delete import delete
from vmcell_shim.living import Living, start_ticks
from vmcell_shim.sandbox_files import SandboxFiles, load
from vmcell_shim.share import Share

pytestmark = pytest.mark.root
ROOT_FOLDER = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "run/ns" / ("x" * 64)  # so long that no socket's path fits
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def ends() -> queue.Queue[str]:
    """What a share's `on_end` was told."""
    return queue.Queue()


@pytest.fixture
def shared(state: Path, ends: queue.Queue[str]) -> Iterator[Share]:
    before = descriptors()
    made = Share(os.fspath(state), ends.put)
    yield made
    made.close()
    assert not any(alive(process) for process in made.helpers)
    assert not os.listdir(state)
    assert descriptors() == before


@pytest.fixture
def guest(shared: Share) -> Iterator[FuseClient]:
    with fuse_guest(shared.take_connection()) as client:
        client.init()
        yield client


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host with a mount below it."""
    directory = tmp_path / "source"
    (directory / "below").mkdir(parents=True)
    (directory / "file").write_bytes(b"top")
    return directory


@pytest.fixture
def submount(source: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source / "below"], check=True)
    (source / "below/file").write_bytes(b"below")
    yield source / "below"
    subprocess.run(["umount", "-l", source / "below"], check=True)


def descriptors() -> list[str]:
    gc.collect()  # what earlier tests left open would go at any moment
    return sorted(os.listdir("/proc/self/fd"))


def alive(process: Living) -> bool:
    return start_ticks(process.pid) == process.start_ticks


def refused(call: Callable[[], object]) -> int:
    """The error number that the file system answers with."""
    with pytest.raises(OSError) as raised:
        call()
    return raised.value.errno or 0


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def test_a_directory_is_live_both_ways(shared: Share, guest: FuseClient, source: Path) -> None:
    before = mounts()
    number = shared.add(os.fspath(source), read_only=False)
    assert mounts() == before, "the host's mount table knows nothing of it"
    assert guest.read_file(f"{number}/file") == b"top"
    (source / "later").write_bytes(b"from the host")
    assert guest.read_file(f"{number}/later") == b"from the host"
    guest.write_file(guest.walk(str(number)), "answer", b"from the guest")
    assert (source / "answer").read_bytes() == b"from the guest"


def test_each_directory_has_a_number_of_its_own(shared: Share, source: Path) -> None:
    first, second = (shared.add(os.fspath(source), read_only=True) for _ in range(2))
    shared.remove(first)
    third = shared.add(os.fspath(source), read_only=True)
    assert len({first, second, third}) == 3


@pytest.mark.usefixtures("submount")
def test_read_only_reaches_the_mounts_below(shared: Share, guest: FuseClient, source: Path) -> None:
    number = shared.add(os.fspath(source), read_only=True)
    for place in (str(number), f"{number}/below"):
        assert guest.read_file(f"{place}/file") in (b"top", b"below")
        node = guest.walk(place)
        assert refused(lambda node=node: guest.write_file(node, "new", b"x")) == errno.EROFS
    (source / "below/new").write_bytes(b"the host may still write")


@pytest.mark.usefixtures("submount")
def test_mounts_below_come_along_if_wanted(shared: Share, guest: FuseClient, source: Path) -> None:
    whole = shared.add(os.fspath(source), read_only=False)
    assert guest.read_file(f"{whole}/below/file") == b"below"
    guest.write_file(guest.walk(f"{whole}/below"), "new", b"x")
    alone = shared.add(os.fspath(source), read_only=False, recursive=False)
    assert not guest.exists(guest.walk(f"{alone}/below"), "file")


def test_mounts_made_later_are_followed_if_wanted(
    shared: Share, guest: FuseClient, source: Path
) -> None:
    with ExitStack() as undo:
        subprocess.run(["mount", "--bind", source, source], check=True)
        undo.callback(subprocess.run, ["umount", "-R", "-l", source], check=True)
        subprocess.run(["mount", "--make-shared", source], check=True)
        still = shared.add(os.fspath(source), read_only=False)
        moving = shared.add(os.fspath(source), read_only=False, follow=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source / "below"], check=True)
        (source / "below/file").write_bytes(b"later")
        assert guest.read_file(f"{moving}/below/file") == b"later"
        assert not guest.exists(guest.walk(f"{still}/below"), "file")


def test_a_file_can_be_shared(shared: Share, guest: FuseClient, source: Path) -> None:
    (source / "link").symlink_to("file")
    number = shared.add(os.fspath(source / "link"), read_only=True)
    assert guest.read_file(str(number)) == b"top"
    (source / "file").write_bytes(b"changed in place")
    assert guest.read_file(str(number)) == b"changed in place"


def test_the_guest_cannot_write_beside_its_directories(shared: Share, guest: FuseClient) -> None:
    assert refused(lambda: guest.write_file(ROOT, "new", b"x")) == errno.EROFS
    assert not (Path(f"/proc/{shared.helpers[1].pid}") / "root" / "etc").exists()


def test_what_is_removed_is_gone(shared: Share, guest: FuseClient, source: Path) -> None:
    number = shared.add(os.fspath(source), read_only=False)
    assert guest.exists(ROOT, str(number))
    shared.remove(number)
    assert not guest.exists(ROOT, str(number))
    assert (source / "file").read_bytes() == b"top"
    with pytest.raises(CallerError, match=f"number {number}"):
        shared.remove(number)


def test_only_directories_and_files_are_shared(shared: Share, state: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/null")):
            with pytest.raises(CallerError, match="neither a directory nor a regular file"):
                shared.add(os.fspath(path), read_only=False)
    with pytest.raises(HostError, match=r"share .*/nothing: No such file"):
        shared.add(os.fspath(tmp_path / "nothing"), read_only=False)
    assert os.listdir(state / "share") == []


def test_there_is_an_end_to_directories(
    shared: Share, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "MAX_MOUNTS", 2)
    numbers = [shared.add(os.fspath(source), read_only=True) for _ in range(2)]
    with pytest.raises(CallerError, match="shares 2 directories at most"):
        shared.add(os.fspath(source), read_only=True)
    shared.remove(numbers[0])
    shared.add(os.fspath(source), read_only=True)


@pytest.mark.parametrize("which", [0, 1], ids=["waiting", "serving"])
def test_the_daemons_death_is_told_once(
    shared: Share, source: Path, ends: queue.Queue[str], which: int
) -> None:
    shared.add(os.fspath(source), read_only=False)
    os.kill(shared.helpers[which].pid, signal.SIGKILL)
    assert ends.get(timeout=DEADLINE_S).startswith("virtiofsd has ended")
    with pytest.raises(HostError, match="virtiofsd has ended") as raised:
        shared.add(os.fspath(source), read_only=False)
    assert raised.value.code == "unavailable"
    shared.remove(0)
    shared.close()
    assert ends.empty()


def test_the_daemon_does_not_outlive_its_vmm(shared: Share, ends: queue.Queue[str]) -> None:
    vmm_end = shared.take_connection()
    assert ends.empty()
    vmm_end.close()
    assert ends.get(timeout=DEADLINE_S).startswith("virtiofsd has ended")


def test_who_is_told_of_the_end_may_close(state: Path) -> None:
    closed = threading.Event()

    def close(_: str) -> None:
        made.close()
        closed.set()

    made = Share(os.fspath(state), close)
    os.kill(made.helpers[1].pid, signal.SIGKILL)
    assert closed.wait(DEADLINE_S)
    assert not os.listdir(state)


def test_closing_is_no_death(state: Path, ends: queue.Queue[str], source: Path) -> None:
    made = Share(os.fspath(state), ends.put)
    made.add(os.fspath(source), read_only=False)
    made.close()
    made.close()
    assert ends.empty()
    assert (source / "file").exists()
    with pytest.raises(HostError, match="virtiofsd has ended"):
        made.add(os.fspath(source), read_only=False)


def test_the_daemon_is_jailed(shared: Share) -> None:
    status = Path(f"/proc/{shared.helpers[1].pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Seccomp"] == "2"
    assert fields["NoNewPrivs"] == "1"
    # chown, dac_override, fowner, fsetid, setgid, setuid (capabilities(7))
    assert int(fields["CapEff"], 16) == 0b1101_1011
    for name in ("mnt", "pid", "net"):
        theirs = os.stat(f"/proc/{shared.helpers[1].pid}/ns/{name}")
        assert theirs.st_ino != os.stat(f"/proc/self/ns/{name}").st_ino
    table = Path(f"/proc/{shared.helpers[1].pid}/mountinfo").read_text().splitlines()
    assert len(table) == 1, "its root is all there is"


SHIM = """
import os, sys, time
sys.path[:0] = sys.argv[3:]
from vmcell_shim.living import identify
from vmcell_shim.sandbox_files import SandboxFiles
from vmcell_shim.share import Share
files = SandboxFiles(sys.argv[1])
files.create(os.getcwd())
files.shim = identify(os.getpid())
share = Share(files.directory, print)
files.helpers = share.helpers
files.save()
share.add(sys.argv[2], read_only=False)
print("shared", flush=True)
time.sleep(60)
"""


def dead_shim(state: Path, source: Path, bundle: Path) -> SandboxFiles:
    """A sandbox whose shim was killed with a directory shared."""
    bundle.mkdir()
    roots = [os.fspath(ROOT_FOLDER / name) for name in ("protos", "runtime", "shim")]
    words = [sys.executable, "-c", SHIM, os.fspath(state), os.fspath(source), *roots]
    process = subprocess.Popen(words, cwd=bundle, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "shared\n"
    process.kill()
    process.communicate()
    return load(os.fspath(state))


def test_delete_removes_what_a_killed_shim_left(state: Path, source: Path, tmp_path: Path) -> None:
    files = dead_shim(state, source, tmp_path / "bundle")
    assert len(files.helpers) == 2
    begin = time.monotonic()
    delete(os.fspath(tmp_path / "bundle"))
    assert time.monotonic() - begin < 1
    assert not any(alive(process) for process in files.helpers)
    assert not state.exists()
    assert (source / "file").read_bytes() == b"top", "nothing was removed through the share"


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[SilentFuse]:
    """A file system that answers nothing, like a network disk whose server is dead."""
    place = tmp_path / "stuck"
    place.mkdir()
    with silent_fuse(place) as server:
        yield server


def has_ended(process: Living, timeout_s: float = 0) -> bool:
    """Whether every thread of it is gone; the first one alone makes it a zombie."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(timeout_s * 1000))
    os.close(pidfd)
    return ended


def test_a_source_that_hangs_is_given_up(
    shared: Share, stuck: SilentFuse, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    monkeypatch.setattr(share, "STEP_TIMEOUT_S", 0.3)
    with pytest.raises(HostError, match=r"longer than 0\.3 s; does its file system answer"):
        shared.add(os.fspath(stuck.place / "inside"), read_only=False)
    monkeypatch.undo()
    assert shared.add(os.fspath(source), read_only=False) == 0
    stuck.release()
    for thread in threading.enumerate():
        if thread.name.startswith("share "):
            thread.join(DEADLINE_S)


def test_a_daemon_that_hangs_does_not_keep_the_shim(
    state: Path, stuck: SilentFuse, source: Path
) -> None:
    with ExitStack() as undo:
        subprocess.run(["mount", "--bind", stuck.place, source / "below"], check=True)
        undo.callback(subprocess.run, ["umount", "-l", source / "below"], check=True)
        made = Share(os.fspath(state), print)
        undo.callback(stuck.release)
        number = made.add(os.fspath(source), read_only=False)
        guest = undo.enter_context(fuse_guest(made.take_connection()))
        guest.init()
        guest.send(LOOKUP, guest.walk(str(number)), b"below\0")
        stuck.wait_for_request()
        begin = time.monotonic()
        with pytest.raises(HostError, match="killed but hangs"):
            made.close()
        assert time.monotonic() - begin < 3
        assert not has_ended(made.helpers[1])
        assert not os.listdir(state)
    assert has_ended(made.helpers[1], DEADLINE_S)


def test_a_process_that_hangs_does_not_keep_delete(
    state: Path, stuck: SilentFuse, source: Path, tmp_path: Path
) -> None:
    files = dead_shim(state, source, tmp_path / "bundle")
    asks = subprocess.Popen(["stat", stuck.place / "name"], stderr=subprocess.DEVNULL)
    stuck.wait_for_request()
    ticks = start_ticks(asks.pid)
    assert ticks is not None
    files.helpers.append(Living(asks.pid, ticks))
    files.save()
    begin = time.monotonic()
    delete(os.fspath(tmp_path / "bundle"))
    assert time.monotonic() - begin < 1
    assert asks.poll() is None, "it hangs on"
    assert not state.exists()
    stuck.release()
    asks.wait(DEADLINE_S)


def test_without_virtiofsd_the_error_says_what_to_install(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match=r"at none of /nowhere; install it"):
        virtiofsd.Virtiofsd(os.fspath(state), programs=["/nowhere"])
    assert not os.listdir(state)


def test_a_daemon_that_does_not_start_says_why(state: Path, tmp_path: Path) -> None:
    before = descriptors()
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(HostError, match=r"did not start: .*; it said: out of order"):
        virtiofsd.Virtiofsd(os.fspath(state / "share"), programs=[os.fspath(program)])
    assert descriptors() == before
    assert not os.listdir(state)


def test_a_step_elsewhere_brings_its_error_home() -> None:
    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with pytest.raises(HostError, match="trying: No such file"):
        mount_calls.in_time(fail, "trying", DEADLINE_S)
    with pytest.raises(ZeroDivisionError):
        mount_calls.in_time(lambda: [1 // 0].clear(), "trying", DEADLINE_S)
