"""`ctr` saves containers and goes on from them, here and on another node; the guest is a fake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from containerd_release import DEBIAN, NEWER, find_release
from private_containerd import IMAGE, RUNTIME, PrivateContainerd
from shim_harness import wait_until

pytestmark = pytest.mark.root

SAVED = "docker.io/vmcell-test/saved:1"


@contextmanager
def running(directory: Path, release: str, *, zygote: bool = False) -> Iterator[PrivateContainerd]:
    """A daemon that has the image."""
    containerd = PrivateContainerd(
        directory, fake_guest=True, zygote=zygote, release=find_release(release)
    )
    (directory / "tmp").mkdir()
    if containerd.zygote is not None:
        containerd.zygote.start()
    with pytest.MonkeyPatch.context() as patch:
        # Where it makes and lays out checkpoints.
        patch.setenv("XDG_RUNTIME_DIR", str(directory / "tmp"))
        containerd.start()
    try:
        containerd.import_image()
        yield containerd
    finally:
        containerd.kill()
        if containerd.zygote is not None:
            containerd.zygote.kill()


@pytest.fixture(
    scope="module", params=[(DEBIAN, "direct"), (DEBIAN, "zygote"), (NEWER, "direct")], ids="-".join
)
def daemon(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateContainerd]:
    name, way = request.param
    with running(tmp_path_factory.mktemp("ctd"), name, zygote=way == "zygote") as containerd:
        yield containerd


@pytest.fixture
def containerd(daemon: PrivateContainerd) -> Iterator[PrivateContainerd]:
    """The daemon, checked afterwards: nothing is left of the containers and the checkpoints."""
    yield daemon
    clean(daemon)


def clean(daemon: PrivateContainerd) -> None:
    for name in ("c1", "c2", "c3"):
        daemon.ctr("task", "delete", "-f", name)
        daemon.ctr("container", "delete", name)
    wait_until(lambda: daemon.leftovers() == [], f"an end of {daemon.leftovers()}")
    for name in images(daemon):
        if name != IMAGE:
            assert daemon.ctr("image", "rm", "--sync", name).returncode == 0
    assert list(daemon.directory.glob("snapshots/*")) == []
    assert list(daemon.directory.glob("snapshots/.*")) == []
    assert list(daemon.directory.glob("tmp/*")) == []


def images(daemon: PrivateContainerd) -> list[str]:
    return daemon.ctr("image", "ls", "-q").stdout.decode().split()


def succeed(daemon: PrivateContainerd, *words: str) -> str:
    done = daemon.ctr(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def begin(daemon: PrivateContainerd, said: Path, *flags: str) -> None:
    """c1 runs; a fake guest that goes on from a snapshot says the same again."""
    script = f"echo here >> {said}; exec sleep 600"
    done = daemon.run("c1", "sh", "-c", script, flags=("-d", *flags))
    assert done.returncode == 0, done.stderr
    said_times(said, 1)


def said_times(said: Path, times: int) -> None:
    wait_until(
        lambda: said.exists() and said.read_text() == "here\n" * times, f"{times} containers' word"
    )


@pytest.fixture
def said(tmp_path: Path) -> Path:
    return tmp_path / "said"


def test_task_checkpoint(containerd: PrivateContainerd, said: Path) -> None:
    """The image has the four files; the container goes on."""
    begin(containerd, said)
    name = succeed(containerd, "task", "checkpoint", "c1").strip()
    assert containerd.status("c1") == "RUNNING"
    assert name in images(containerd)
    target = succeed(containerd, "image", "ls", f"name=={name}").splitlines()[1].split()[2]
    index = json.loads(succeed(containerd, "content", "get", target))
    (row,) = [row for row in index["manifests"] if "checkpoint.criu" in row["mediaType"]]
    archive = containerd.directory / "archive.tar"
    archive.write_bytes(containerd.ctr("content", "get", row["digest"]).stdout)
    listed = subprocess.run(["tar", "tf", archive], capture_output=True, text=True, check=True)
    assert {os.path.basename(name) for name in listed.stdout.split()} >= {
        "manifest.json",
        "memory.packed",
        "state.json.packed",
        "disk.packed",
    }
    done = containerd.ctr("task", "exec", "--exec-id", "e1", "c1", "echo", "still here")
    assert done.stdout == b"still here\n", done.stderr


def test_a_paused_task_stays_paused(containerd: PrivateContainerd, said: Path) -> None:
    begin(containerd, said)
    succeed(containerd, "task", "pause", "c1")
    succeed(containerd, "task", "checkpoint", "c1")
    assert containerd.status("c1") == "PAUSED"
    succeed(containerd, "task", "resume", "c1")
    assert containerd.status("c1") == "RUNNING"


def test_restored_beside_the_one_that_was_saved(containerd: PrivateContainerd, said: Path) -> None:
    begin(containerd, said)
    succeed(containerd, "containers", "checkpoint", "--task", "c1", SAVED)
    assert containerd.status("c1") == "RUNNING"
    succeed(containerd, "containers", "restore", "--live", "c2", SAVED)
    said_times(said, 2)
    assert (containerd.status("c1"), containerd.status("c2")) == ("RUNNING", "RUNNING")
    # And once more, of one that came from a checkpoint itself.
    succeed(containerd, "image", "rm", "--sync", SAVED)
    succeed(containerd, "containers", "checkpoint", "--task", "c2", SAVED)
    succeed(containerd, "containers", "restore", "--live", "c3", SAVED)
    said_times(said, 3)


def test_restored_after_the_end_of_the_one_that_was_saved(
    containerd: PrivateContainerd, said: Path
) -> None:
    begin(containerd, said)
    succeed(containerd, "containers", "checkpoint", "--task", "c1", SAVED)
    succeed(containerd, "task", "delete", "-f", "c1")
    succeed(containerd, "containers", "delete", "c1")
    succeed(containerd, "containers", "restore", "--live", "c1", SAVED)
    said_times(said, 2)
    succeed(containerd, "task", "kill", "-s", "KILL", "c1")
    wait_until(lambda: containerd.status("c1") == "STOPPED", "the exit")
    assert b"exit code 137" in containerd.ctr("task", "delete", "c1").stderr


def test_restored_without_live(containerd: PrivateContainerd, said: Path) -> None:
    """`ctr restore` without --live starts the program anew."""
    begin(containerd, said)
    succeed(containerd, "containers", "checkpoint", "--task", "c1", SAVED)
    succeed(containerd, "task", "delete", "-f", "c1")
    succeed(containerd, "containers", "restore", "c2", SAVED)
    said_times(said, 2)
    log = (containerd.directory / "run/default/c2/shim.log").read_text()
    assert "booting c2" in log
    assert "restoring" not in log


def test_exit(containerd: PrivateContainerd, said: Path) -> None:
    """`ctr` of 1.6 tells no runtime but runc of --exit."""
    begin(containerd, said)
    succeed(containerd, "task", "checkpoint", "--exit", "c1")
    if containerd.release.name == DEBIAN:
        assert containerd.status("c1") == "RUNNING"
        return
    wait_until(lambda: containerd.status("c1") == "STOPPED", "the exit")
    assert b"exit code 137" in containerd.ctr("task", "delete", "c1").stderr


@pytest.mark.parametrize("flag", ["image-path", "work-path"])
def test_paths_for_criu_are_refused(
    containerd: PrivateContainerd, said: Path, flag: str, tmp_path: Path
) -> None:
    """`ctr` of 1.6 tells no runtime but runc of them."""
    begin(containerd, said)
    done = containerd.ctr("task", "checkpoint", f"--{flag}", str(tmp_path / "p"), "c1")
    if containerd.release.name != DEBIAN:
        assert done.returncode != 0
        assert f"asks for {flag.replace('-', '_')} " in done.stderr.decode()
    assert containerd.status("c1") == "RUNNING"


def test_another_image_under_the_checkpoint(containerd: PrivateContainerd, said: Path) -> None:
    """The snapshot is of a guest that has seen the image; with another one it cannot go on."""
    begin(containerd, said, "--annotation", "io.vmcell.memory-mib=64")
    succeed(containerd, "containers", "checkpoint", "--task", "c1", SAVED)
    base = containerd.directory / "base.erofs"
    base.write_bytes(b"an update of vmcell")
    try:
        done = containerd.ctr("containers", "restore", "--live", "c2", SAVED)
    finally:
        base.write_bytes(b"")
    assert done.returncode != 0
    assert "was made with another version of the base image; make it again" in done.stderr.decode()
    assert containerd.status("c2") == ""


@pytest.mark.parametrize("release", [DEBIAN, NEWER])
def test_on_another_node(release: str, tmp_path: Path, said: Path) -> None:
    """Exported to a file, imported by a containerd that has the container's image and nothing
    else of the first: it goes on there."""
    archive = tmp_path / "saved.tar"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with running(tmp_path / "one", release) as first:
        begin(first, said)
        succeed(first, "containers", "checkpoint", "--task", "c1", SAVED)
        # By the transfer service ctr 2.x sometimes ends before the archive does.
        local = ["--local"] if release == NEWER else []
        succeed(first, "image", "export", "--skip-manifest-json", *local, str(archive), SAVED)
        clean(first)
    shutil.rmtree(tmp_path / "one")
    with running(tmp_path / "two", release) as second:
        succeed(second, "image", "import", "--no-unpack", str(archive))
        succeed(second, "containers", "restore", "--live", "c2", SAVED)
        said_times(said, 2)
        assert second.status("c2") == "RUNNING"
        done = second.run("c3", "true", flags=("--rm", "--runtime", RUNTIME))
        assert done.returncode == 0, done.stderr
        clean(second)
