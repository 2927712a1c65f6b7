"""Files handed in by the host, against images that want them elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import (
    AgentUnderTest,
    container_spec,
    make_busybox_tree,
    make_erofs,
    process_spec,
    running_agent,
)

from vmcell_agent import copyin
from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError, VmcellError


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the host that a hostile image would like to write to."""
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def hostile_image(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Path:
    """Busybox with symlinks out of the container in every place where a file is copied to."""
    directory = tmp_path_factory.mktemp("hostile")
    tree = directory / "tree"
    make_busybox_tree(tree)
    (tree / "etc/absolute").symlink_to(outside / "absolute")
    (tree / "etc/climbing").symlink_to("../" * 12 + str(outside)[1:] + "/climbing")
    (tree / "etc/folder").symlink_to(outside)
    (tree / "etc/resolv.conf").symlink_to("../run/resolve/stub.conf")
    (tree / "etc/kernel").symlink_to("/proc/sys/kernel/hostname")
    (tree / "etc/fifo-link").symlink_to("fifo")
    (tree / "etc/loop").symlink_to("loop")
    os.mkfifo(tree / "etc/fifo")
    (tree / "etc/by-proc").symlink_to(Path("/proc/1", "root", "../../etc/by-proc-seen"))
    return make_erofs(tree, directory / "hostile.erofs")


@pytest.fixture
def hostile_agent(hostile_image: Path) -> Iterator[AgentUnderTest]:
    with running_agent() as running:
        running.attach_lower(hostile_image)
        running.attach_upper()
        yield running


@pytest.mark.root
@pytest.mark.parametrize(
    "destination",
    ["/etc/absolute", "/etc/climbing", "/etc/folder/file", "/etc/resolv.conf", "/../../etc/plain",
     "/new/folders/file", "/etc/../etc/./dots", "/etc/by-proc"],
)  # fmt: skip
def test_a_copy_stays_inside_and_is_found_by_its_name(
    hostile_agent: AgentUnderTest, outside: Path, destination: str
) -> None:
    file = FileCopy(destination=destination, mode=0o644, uid=1000, gid=5, content=b"copied")
    script = f"cat {destination}; stat -Lc ' %a %u %g' {destination}"
    init = hostile_agent.create(
        container_spec(process_spec("sh", "-c", script)), files=[file]
    ).start()
    assert init.read() == b"copied 644 1000 5\n"
    assert init.wait() == 0
    assert list(outside.iterdir()) == []


@pytest.mark.root
@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("/etc/kernel", "file system of the kernel's"),
        ("/proc/sys/kernel/domainname", "file system of the kernel's"),
        ("/sys/new", "file system of the kernel's"),
        ("/etc/fifo", "copy /etc/fifo into the container"),
        ("/etc/fifo-link", "copy /etc/fifo-link into the container"),
        ("/etc/loop", "copy /etc/loop into the container"),
        ("/bin", "copy /bin into the container"),
    ],
)
def test_a_copy_that_would_not_be_a_file_is_refused(
    hostile_agent: AgentUnderTest, destination: str, words: str
) -> None:
    file = FileCopy(destination=destination, mode=0o644, content=b"x")
    init = hostile_agent.create(container_spec(process_spec("true")), files=[file])
    with pytest.raises(VmcellError) as error:
        init.start()
    assert words in str(error.value)
    init.delete()
    assert hostile_agent.state_left() == []


@pytest.mark.root
def test_directories_and_read_only_copies(agent: AgentUnderTest) -> None:
    files = [
        FileCopy(destination="/run/secrets", mode=0o750, uid=1000, directory=True),
        FileCopy(destination="/run/secrets/token", mode=0o400, content=b"t" * (1 << 20)),
        FileCopy(destination="/etc/fixed", mode=0o644, content=b"fixed", read_only=True),
        FileCopy(destination="/srv/fixed", mode=0o755, directory=True, read_only=True),
    ]
    script = """
        stat -c '%a %u' /run/secrets; wc -c </run/secrets/token
        echo x >/etc/fixed || echo ro; touch /srv/fixed/x || echo ro; cat /etc/fixed
        rm -f /etc/fixed || echo busy
    """
    init = agent.create(container_spec(process_spec("sh", "-c", script)), files=files).start()
    assert init.read().split() == [b"750", b"1000", b"1048576", b"ro", b"ro", b"fixedbusy"]
    assert init.wait() == 0


@pytest.mark.root
def test_mount_points_that_are_symlinks_stay_inside(
    hostile_agent: AgentUnderTest, outside: Path
) -> None:
    spec = container_spec(process_spec("sh", "-c", "touch /etc/folder/seen; sleep 1000"))
    spec["mounts"].append({"destination": "/etc/folder", "type": "tmpfs", "options": ["size=64k"]})
    init = hostile_agent.create(spec).start()
    assert list(outside.iterdir()) == []
    init.signal(signal.SIGKILL)
    assert init.wait() == 137


def test_what_cannot_be_a_file_is_refused_before_anything_is_made() -> None:
    for file, words in (
        (FileCopy(destination="etc/x"), "must be absolute"),
        (FileCopy(destination="/x\0y"), "must be absolute"),
        (FileCopy(destination="/x", mode=0o10000), "mode 10000"),
        (FileCopy(destination="/x", content=bytes((1 << 20) + 1)), "at most 1048576"),
    ):
        with pytest.raises(CallerError, match=words):
            copyin.check([file])
    with pytest.raises(CallerError, match="1025 files"):
        copyin.check([FileCopy(destination="/x")] * 1025)
