"""A real containerd and ctr drive the real shim binary; only the guest is a fake."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_release import DEBIAN, NEWER, find_release
from private_containerd import IMAGE, RUNTIME, PrivateContainerd, image_archive
from shim_harness import wait_until
from zygote_harness import children

from vmcell_shim.cache_collector import collect, list_images

pytestmark = pytest.mark.root


@pytest.fixture(
    scope="module", params=[(DEBIAN, "direct"), (DEBIAN, "zygote"), (NEWER, "direct")], ids="-".join
)
def daemon(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateContainerd]:
    """Everything has to come out the same with each containerd, with a zygote and without."""
    name, way = request.param
    containerd = PrivateContainerd(
        tmp_path_factory.mktemp("ctd"),
        fake_guest=True,
        zygote=way == "zygote",
        release=find_release(name),
    )
    if containerd.zygote is not None:
        containerd.zygote.start()
    containerd.start()
    try:
        containerd.import_image()
        yield containerd
    finally:
        containerd.kill()
        if containerd.zygote is not None:
            containerd.zygote.kill()


@pytest.fixture
def containerd(daemon: PrivateContainerd) -> Iterator[PrivateContainerd]:
    """The daemon, checked afterwards: whatever the test did, nothing of it is left."""
    yield daemon
    remove(daemon, "c1")
    wait_until(lambda: daemon.leftovers() == [], f"an end of {daemon.leftovers()}")
    assert daemon.ctr("task", "list", "-q").stdout == b""


def remove(containerd: PrivateContainerd, name: str) -> None:
    """Like a user who wants it gone, whatever state it is in."""
    containerd.ctr("task", "delete", "-f", name)
    containerd.ctr("container", "delete", name)


def test_run(containerd: PrivateContainerd) -> None:
    done = containerd.run("c1", "sh", "-c", "echo out; echo err >&2; exit 7", flags=("--rm",))
    assert (done.returncode, done.stdout) == (7, b"out\n")
    # ctr 2.x warns of this containerd's deprecated things before.
    assert done.stderr.splitlines()[-1] == b"err"


def test_short_input_ends(containerd: PrivateContainerd) -> None:
    done = containerd.run("c1", "cat", flags=("--rm",), stdin=b"hello\n")
    assert (done.returncode, done.stdout) == (0, b"hello\n")


def test_long_input_arrives_whole(containerd: PrivateContainerd) -> None:
    data = random.Random(3).randbytes(100_000_000)
    done = containerd.run("c1", "cat", flags=("--rm",), stdin=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_terminal(containerd: PrivateContainerd) -> None:
    line = (
        f"{containerd.release.program('ctr')} --address {containerd.socket} run --rm -t "
        f"--runtime {RUNTIME} {IMAGE} c1 sh -c 'tty; exit 3'"
    )
    done = subprocess.run(
        ["script", "-qec", line, "/dev/null"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stdout
    assert b"/dev/pts/" in done.stdout


def test_detached_task_exec_and_metrics(containerd: PrivateContainerd) -> None:
    assert containerd.run("c1", "sleep", "600", flags=("-d",)).returncode == 0
    done = containerd.ctr(
        "task", "exec", "--exec-id", "e1", "c1", "sh", "-c", "cat; exit 5", stdin=b"in"
    )
    assert (done.returncode, done.stdout) == (5, b"in")
    assert b"memory.usage " in containerd.ctr("task", "metrics", "c1").stdout
    assert str(containerd.pid("c1")).encode() in containerd.ctr("task", "ps", "c1").stdout
    assert containerd.ctr("task", "pause", "c1").returncode == 0
    assert b"PAUSED" in containerd.ctr("task", "ls").stdout
    assert containerd.ctr("task", "resume", "c1").returncode == 0
    assert containerd.ctr("task", "delete", "c1").returncode != 0


def test_log_uris(containerd: PrivateContainerd) -> None:
    """A detached task whose streams go to a file, then one whose streams go to a program."""
    directory = containerd.directory / "logs"
    command = ("sh", "-c", "echo out; echo err >&2")
    flags = ("-d", "--log-uri", f"file://{directory}/file")
    assert containerd.run("c1", *command, flags=flags).returncode == 0
    wait_until(lambda: containerd.status("c1") == "STOPPED", "the exit")
    assert sorted((directory / "file").read_text().split()) == ["err", "out"]
    remove(containerd, "c1")
    program = containerd.directory / "logger"
    program.write_text(
        f"#!/bin/sh\nexec 5>&-\ncat <&3 >{directory}/$2-$CONTAINER_NAMESPACE-$CONTAINER_ID-out &\n"
        f"cat <&4 >{directory}/err\nwait\n"
    )
    program.chmod(0o755)
    flags = ("-d", "--log-uri", f"binary://{program}?name=log")
    done = containerd.run("c1", *command, flags=flags)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: containerd.status("c1") == "STOPPED", "the exit")
    remove(containerd, "c1")
    logged = [(directory / name).read_text() for name in ("log-default-c1-out", "err")]
    assert logged == ["out\n", "err\n"]


def test_killed_vmm(containerd: PrivateContainerd) -> None:
    containerd.run("c1", "sleep", "600", flags=("-d",))
    began = time.monotonic()
    os.kill(containerd.pid("c1"), signal.SIGKILL)
    wait_until(lambda: containerd.status("c1") == "STOPPED", "the exit", 5)
    assert time.monotonic() - began < 1.5
    assert b"exit code 137" in containerd.ctr("task", "delete", "c1").stderr


def test_killed_shim(containerd: PrivateContainerd) -> None:
    """containerd runs `delete`, which finds and ends the VMM by the state file."""
    containerd.run("c1", "sleep", "600", flags=("-d",))
    pid = containerd.pid("c1")
    (shim,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and containerd.is_shim(command_line(entry))
    ]
    os.kill(shim, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the VMM's end", 6)
    wait_until(lambda: containerd.status("c1") in ("", "STOPPED"), "the exit", 6)


def command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_killed_zygote(containerd: PrivateContainerd) -> None:
    """What runs goes on, the next start works, and then there is a zygote again."""
    if containerd.zygote is None:
        assert containerd.run("c1", "true", flags=("--rm",)).returncode == 0
        return
    containerd.run("c1", "sleep", "600", flags=("-d",))
    containerd.zygote.kill()
    done = containerd.ctr("task", "exec", "--exec-id", "e1", "c1", "echo", "still here")
    assert done.stdout == b"still here\n", done.stderr
    remove(containerd, "c1")
    assert containerd.run("c1", "echo", "direct", flags=("--rm",)).stdout == b"direct\n"
    containerd.zygote.start()
    containerd.run("c1", "sleep", "600", flags=("-d",))
    (shim,) = children(containerd.zygote.pid)
    assert containerd.is_shim(command_line(Path(f"/proc/{shim}")))


def test_restart_of_containerd(containerd: PrivateContainerd) -> None:
    """The task lives on, is found again, can be used, and its exit is not lost."""
    containerd.run(
        "c1", "sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done", flags=("-d",)
    )
    containerd.kill()
    containerd.start()
    assert containerd.status("c1") == "RUNNING"
    done = containerd.ctr("task", "exec", "--exec-id", "e1", "c1", "echo", "still here")
    assert done.stdout == b"still here\n", done.stderr
    containerd.ctr("task", "kill", "-s", "TERM", "c1")
    wait_until(lambda: containerd.status("c1") == "STOPPED", "the exit")
    assert b"exit code 9" in containerd.ctr("task", "delete", "c1").stderr


def test_started_again_after_its_end(containerd: PrivateContainerd) -> None:
    """The same container, the same snapshot, a second task."""
    assert containerd.run("c1", "sh", "-c", "exit 4", flags=()).returncode == 4
    done = containerd.ctr("task", "start", "c1")
    assert done.returncode == 4, done.stderr


def test_native_snapshotter(containerd: PrivateContainerd) -> None:
    """A bind mount of a whole copy: an image of its own, gone with the container."""
    flags = ("--rm", "--snapshotter", "native")
    done = containerd.run("c1", "echo", "hello", flags=flags)
    assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr


def test_an_image_goes_with_containerds(containerd: PrivateContainerd) -> None:
    """The cache follows the snapshotter, which follows the image store."""
    name = "docker.io/vmcell-test/passing:latest"
    archive = containerd.directory / "passing.tar"
    archive.write_bytes(image_archive(name, [{"etc": None, "etc/passing": b"by"}]))
    assert containerd.ctr("image", "import", str(archive)).returncode == 0
    cache = str(containerd.directory / "cache")
    before = {row.path for row in list_images(cache)}
    done = containerd.ctr("run", "-d", "--runtime", RUNTIME, name, "c1", "sleep", "600")
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in list_images(cache) if row.path not in before]
    assert row.state == "in use"
    assert row.layers[0].startswith(str(containerd.directory / "root"))
    remove(containerd, "c1")
    wait_until(lambda: {row.path: row.state for row in list_images(cache)}[row.path] == "idle", "")
    assert row.path not in [gone.path for gone in collect(cache, limit_mib=1024)]
    assert containerd.ctr("image", "remove", "--sync", name).returncode == 0
    wait_until(lambda: not os.path.exists(row.layers[0]), "containerd's removal of the layer")
    assert row.path in [gone.path for gone in collect(cache, limit_mib=1024)]
    assert not os.path.exists(row.path)


BAD = {
    "io.vmcell.vcpus asks for 99 vCPUs": ("--annotation", "io.vmcell.vcpus=99"),
    "io.vmcell.vcpus asks for 0 vCPUs": ("--annotation", "io.vmcell.vcpus=0"),
    "1048576 bytes of memory": ("--memory-limit", "1048576"),
    "neither a file nor a directory": (
        "--mount",
        "type=bind,src=/dev/null,dst=/null,options=rbind:rw",
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_requests(containerd: PrivateContainerd, sentence: str) -> None:
    done = containerd.run("c1", "true", flags=("--rm", *BAD[sentence]))
    assert done.returncode != 0
    assert sentence in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_missing_program(containerd: PrivateContainerd) -> None:
    done = containerd.run("c1", "/no/such/program", flags=("--rm",))
    assert done.returncode != 0
    assert b"/no/such/program" in done.stderr


def test_real_vmm_without_a_kernel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not the fake: either /dev/kvm runs no Linux, or the kernel is an empty file."""
    containerd = PrivateContainerd(tmp_path_factory.mktemp("real"), fake_guest=False)
    containerd.start()
    try:
        containerd.import_image()
        done = containerd.run("c1", "true", flags=("--rm",))
        assert done.returncode != 0
        sentence = done.stderr.decode()
        assert "cannot start the microVM" in sentence
        assert sentence.count("\n") == 1
        wait_until(lambda: containerd.leftovers() == [], "the shim's end")
    finally:
        containerd.kill()
