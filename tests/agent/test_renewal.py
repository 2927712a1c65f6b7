"""Files of the host's written again into a running container, and files read out of one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import (
    AgentUnderTest,
    Running,
    container_spec,
    make_busybox_tree,
    make_erofs,
    process_spec,
    running_agent,
)
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent import renewal
from vmcell_protos import agent as messages
from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError, VmcellError

BOTH = [False, True]


def file(destination: str, content: bytes = b"old\n", **changes: Any) -> FileCopy:
    return FileCopy(**{"destination": destination, "mode": 0o644, "content": content, **changes})


def folder(destination: str, **changes: Any) -> FileCopy:
    return FileCopy(**{"destination": destination, "mode": 0o755, "directory": True, **changes})


def sleeping(
    agent: AgentUnderTest, files: list[FileCopy], *, read_only_root: bool = False, **changes: Any
) -> Running:
    spec = container_spec(process_spec("sh", "-c", "echo up; exec sleep 1000"), **changes)
    spec["root"]["readonly"] = read_only_root
    init = agent.create(spec, files=files).start()
    init.read_until(b"up\n")
    return init


def copy(agent: AgentUnderTest, *files: FileCopy, container_id: str = "c1") -> None:
    request = messages.CopyFilesRequest(container_id=container_id, files=list(files))
    agent.client.call("CopyFiles", request)


def read(
    agent: AgentUnderTest, path: str, limit_bytes: int = 4096, container_id: str = "c1"
) -> messages.ReadFileResponse:
    request = messages.ReadFileRequest(
        container_id=container_id, path=path, limit_bytes=limit_bytes
    )
    return messages.ReadFileResponse.decode(agent.client.call("ReadFile", request))


def told(agent: AgentUnderTest, init: Running, script: str) -> str:
    added = agent.add(init, process_spec("sh", "-c", script), "look").start()
    out = added.read() + added.read("stderr")
    added.wait()
    added.delete()
    return out.decode()


@pytest.mark.root
@pytest.mark.parametrize("read_only_root", BOTH)
@pytest.mark.parametrize("read_only", BOTH)
@pytest.mark.parametrize("destination", ["/etc/config", "/run/config", "/new/folder/config"])
def test_a_file_is_replaced_and_stays_what_it_was(
    agent: AgentUnderTest, destination: str, read_only: bool, read_only_root: bool
) -> None:
    files = [file(destination, read_only=read_only)]
    init = sleeping(agent, files, read_only_root=read_only_root)
    for content in (b"second\n", b"3\n", b"x" * 70_000):
        copy(agent, file(destination, content, mode=0o646, uid=1000, gid=5))
        assert read(agent, destination, 1 << 20).content == content
        shown = told(agent, init, f"wc -c <{destination}; stat -c '%a %u %g' {destination}")
        assert shown == f"{len(content)}\n646 1000 5\n"
    assert (told(agent, init, f"echo x >{destination} && echo rw") == "rw\n") is not (
        read_only or (read_only_root and destination != "/run/config")
    )
    parent = os.path.dirname(destination)
    assert told(agent, init, f"ls -A {parent} | grep vmcell; mount | grep -c {destination}") == (
        "1\n" if read_only else "0\n"
    )
    init.signal(signal.SIGKILL)
    assert init.wait() == 137
    init.delete()
    assert agent.state_left() == []


@pytest.mark.root
def test_what_has_gone_from_a_directory_goes(agent: AgentUnderTest) -> None:
    files = [
        folder("/config"),
        file("/config/a"),
        folder("/config/sub"),
        file("/config/sub/b"),
        folder("/config", read_only=True),
        file("/etc/alone", read_only=True),
    ]
    init = sleeping(agent, files)
    names = ("/config/sub/b", "/config/sub", "/config/a", "/config/never-there")
    copy(agent, *(FileCopy(destination=name, remove=True) for name in names))
    copy(agent, file("/config/c", b"new\n"))
    assert told(agent, init, "ls /config; cat /config/c") == "c\nnew\n"
    for name, words in (("/etc/alone", "stays"), ("/etc/passwd", "no file that was copied")):
        with pytest.raises(VmcellError, match=words):
            copy(agent, FileCopy(destination=name, remove=True))


@pytest.mark.root
@pytest.mark.parametrize("read_only", BOTH)
def test_a_reader_never_sees_half_a_file(agent: AgentUnderTest, read_only: bool) -> None:
    size = 300_000
    init = sleeping(agent, [file("/etc/config", b"a" * size, read_only=read_only)])
    script = """
        echo up
        while [ ! -e /run/stop ]; do
            tr -d a </etc/config | wc -c; tr -d b </etc/config | wc -c; wc -c </etc/config
        done
    """
    reader = agent.add(init, process_spec("sh", "-c", script), "reader").start()
    reader.read_until(b"up\n")
    taken: list[bytes] = []
    thread = threading.Thread(target=lambda: taken.append(reader.read()))
    thread.start()
    for number in range(60):
        copy(agent, file("/etc/config", (b"b" if number % 2 == 0 else b"a") * size))
    told(agent, init, "touch /run/stop")
    thread.join(timeout=30)
    assert set(taken[0].split()) == {b"0", str(size).encode()}


@pytest.mark.root
@pytest.mark.parametrize("read_only", BOTH)
def test_a_tree_is_renewed_and_grows(agent: AgentUnderTest, read_only: bool) -> None:
    files = [
        folder("/etc/tree"),
        file("/etc/tree/a"),
        folder("/etc/tree", read_only=read_only),
    ]
    init = sleeping(agent, files)
    copy(
        agent,
        folder("/etc/tree", mode=0o750, gid=5),
        file("/etc/tree/a", b"new\n"),
        folder("/etc/tree/sub", mode=0o711),
        file("/etc/tree/sub/b", b"b\n"),
        file("/etc/tree/other/c", b"c\n"),
    )
    look = "cd /etc/tree; cat a sub/b other/c; stat -c '%a %g' . sub; touch x && echo rw"
    assert told(agent, init, look).splitlines()[:5] == ["new", "b", "c", "750 5", "711 0"]
    assert told(agent, init, look).endswith("rw\n") is not read_only


@pytest.mark.root
def test_before_the_start_the_files_to_come_are_changed(agent: AgentUnderTest) -> None:
    files = [file("/etc/a", read_only=True), folder("/etc/tree"), file("/etc/b")]
    script = "cat /etc/a /etc/b /etc/tree/c; echo x >/etc/a || echo ro"
    init = agent.create(container_spec(process_spec("sh", "-c", script)), files=files)
    copy(agent, file("/etc/a", b"new a\n"), file("/etc/tree/c", b"c\n"))
    with pytest.raises(VmcellError, match="no file that was copied"):
        copy(agent, file("/etc/passwd"))
    with pytest.raises(VmcellError, match="start it first"):
        read(agent, "/etc/a")
    init.start()
    assert init.read().split(b"\n")[:4] == [b"new a", b"old", b"c", b"ro"]
    assert init.wait() == 0


@pytest.fixture
def linked_agent(tmp_path: Path) -> Iterator[AgentUnderTest]:
    """An agent whose image has symlinks where files are copied to."""
    make_busybox_tree(tmp_path / "tree")
    (tmp_path / "tree/etc/resolv.conf").symlink_to("../run/resolve/stub.conf")
    (tmp_path / "tree/home/user/link").symlink_to("/etc")
    with running_agent() as running:
        running.attach_lower(make_erofs(tmp_path / "tree", tmp_path / "image.erofs"))
        running.attach_upper()
        yield running


@pytest.mark.root
@pytest.mark.parametrize("read_only", BOTH)
def test_a_symlink_of_the_image_is_where_the_file_stays(
    linked_agent: AgentUnderTest, read_only: bool
) -> None:
    init = sleeping(linked_agent, [file("/etc/resolv.conf", read_only=read_only)])
    copy(linked_agent, file("/etc/resolv.conf", b"new\n"))
    look = "cat /etc/resolv.conf; readlink /etc/resolv.conf; cat /run/resolve/stub.conf"
    assert told(linked_agent, init, look) == "new\n../run/resolve/stub.conf\nnew\n"


@pytest.mark.root
@pytest.mark.parametrize(
    "trick",
    [
        "mv /home/user/cfg /home/user/was; ln -s /etc /home/user/cfg",
        "mv /home/user/cfg /home/user/was; ln -s link /home/user/cfg",
        "mv /home/user/cfg /home/user/was; echo >/home/user/cfg",
    ],
)
def test_a_users_symlink_leads_no_copy_away(linked_agent: AgentUnderTest, trick: str) -> None:
    init = sleeping(linked_agent, [folder("/home/user/cfg"), file("/home/user/cfg/passwd")])
    before = told(linked_agent, init, "cat /etc/passwd")
    told(linked_agent, init, trick)
    with pytest.raises(VmcellError, match="Not a directory"):
        copy(linked_agent, file("/home/user/cfg/passwd", b"root::0:0::/:\n"))
    assert told(linked_agent, init, "cat /etc/passwd") == before


@pytest.mark.root
def test_a_users_symlink_in_the_files_own_place_is_replaced(agent: AgentUnderTest) -> None:
    init = sleeping(agent, [file("/home/user/file")])
    told(agent, init, "ln -sf /etc/passwd /home/user/file; mkfifo /home/user/.vmcell-copy")
    copy(agent, file("/home/user/file", b"new\n"))
    assert told(agent, init, "cat /home/user/file; ls -A /home/user; wc -l </etc/passwd") == (
        "new\nfile\n2\n"
    )


@pytest.mark.root
def test_a_copy_that_cannot_be_made_again_says_why_and_leaves_nothing(
    agent: AgentUnderTest,
) -> None:
    files = [file("/etc/a"), file("/run/small/b"), file("/etc/ro", read_only=True)]
    init = sleeping(
        agent,
        files,
        mounts=[
            *container_spec({})["mounts"],
            {"destination": "/run/small", "type": "tmpfs", "options": ["size=64k"]},
        ],
    )
    with pytest.raises(VmcellError, match=r"copy /run/small/b .*No space left"):
        copy(agent, file("/run/small/b", b"x" * 100_000))
    assert told(agent, init, "cat /run/small/b; ls -A /run/small") == "old\nb\n"
    told(agent, init, "rm /etc/a; mkdir -p /etc/a/full")
    with pytest.raises(VmcellError, match=r"copy /etc/a .*Is a directory"):
        copy(agent, file("/etc/a"))
    for bad, words in (
        (file("/etc/passwd"), "no file that was copied"),
        (file("/etc/a/../passwd"), "no file that was copied"),
        (file("/etc/a/b"), "no file that was copied"),
        (folder("/etc/a"), "was copied in as a file"),
        (file("relative"), "must be absolute"),
        (file("/etc/a", b"x" * ((1 << 20) + 1)), "at most 1048576"),
        (file("/etc/a", mode=0o10000), "it must be 0 to 7777"),
        (file("/etc/a", uid=1 << 31), "too large"),
    ):
        with pytest.raises(VmcellError, match=words) as error:
            copy(agent, bad)
        assert error.value.code == "invalid_argument"
    with pytest.raises(VmcellError, match="no container 'c9'"):
        copy(agent, file("/etc/a"), container_id="c9")


@pytest.mark.root
def test_a_frozen_container_gets_its_files_too(agent: AgentUnderTest) -> None:
    sleeping(agent, [file("/etc/a")])
    c1 = messages.ContainerRef(container_id="c1")
    agent.client.call("FreezeContainer", c1)
    copy(agent, file("/etc/a", b"new\n"))
    assert read(agent, "/etc/a").content == b"new\n"


@pytest.mark.root
def test_what_an_ended_program_has_left_can_be_read(agent: AgentUnderTest) -> None:
    script = "printf 'last words' >/dev/termination-log; chmod 600 /dev/termination-log"
    init = agent.create(
        container_spec(process_spec("sh", "-c", script)),
        files=[file("/dev/termination-log", b"", mode=0o666)],
    ).start()
    assert init.wait() == 0
    answer = read(agent, "/dev/termination-log")
    assert (answer.content, answer.mode) == (b"last words", 0o600)
    with pytest.raises(VmcellError, match="no such file") as error:
        read(agent, "/dev/nothing")
    assert error.value.code == "not_found"
    before = agent.open_files()
    init.delete()
    assert len(agent.open_files()) < len(before)
    with pytest.raises(VmcellError, match="no container 'c1'"):
        read(agent, "/dev/termination-log")
    assert agent.state_left() == []


@pytest.mark.root
def test_only_files_are_read_and_none_of_the_kernels(agent: AgentUnderTest) -> None:
    script = """
        mkfifo /run/fifo; ln -s /run/fifo /run/to-fifo; ln -s loop /run/loop; mkdir /run/dir
        ln -s /etc/passwd /run/inside; ln -s ../../../../../../etc/passwd /run/climbing
        echo 12345 >/run/five; echo up; exec sleep 1000
    """
    init = agent.create(container_spec(process_spec("sh", "-c", script))).start()
    init.read_until(b"up\n")
    for path in ("/run/inside", "/run/climbing", "/etc/passwd"):
        assert read(agent, path).content.startswith(b"root:x:0:0:root:/root:/bin/sh\nuser")
    assert read(agent, "/run/five", 6).content == b"12345\n"
    for path, limit, words, code in (
        ("/run/five", 5, "more than 5 bytes", "resource_exhausted"),
        ("/run/five", 0, "more than 0 bytes", "resource_exhausted"),
        ("/run/fifo", 9, "no regular file", "failed_precondition"),
        ("/run/to-fifo", 9, "no regular file", "failed_precondition"),
        ("/run/dir", 9, "no regular file", "failed_precondition"),
        ("/dev/zero", 9, "no regular file", "failed_precondition"),
        ("/dev/console", 9, "no such file", "not_found"),
        ("/run/loop", 9, "Too many levels", "failed_precondition"),
        ("/run/five/x", 9, "no such file", "not_found"),
        ("/proc/1/environ", 9, "file system of the kernel's", "invalid_argument"),
        ("/sys/kernel/uevent_seqnum", 9, "file system of the kernel's", "invalid_argument"),
        ("relative", 9, "must be absolute", "invalid_argument"),
        ("", 9, "must be absolute", "invalid_argument"),
        ("/x\0y", 9, "must be absolute", "invalid_argument"),
        ("/run/five", (1 << 20) + 1, "at most 1048576", "invalid_argument"),
        ("/" + "x" * 5000, 9, "path has 5001 bytes", "invalid_argument"),
        ("/" + "x" * 300, 9, "name too long", "failed_precondition"),
    ):
        with pytest.raises(VmcellError) as error:
            read(agent, path, limit)
        assert words in str(error.value)
        assert error.value.code == code, path
    agent.add(init, process_spec("truncate", "-s", "1M", "/run/big"), "big").start().wait()
    assert read(agent, "/run/big", 1 << 20).content == bytes(1 << 20)


@pytest.mark.root
def test_errands_leave_no_process_and_no_descriptor(agent: AgentUnderTest) -> None:
    sleeping(agent, [file("/etc/a", read_only=True), file("/etc/b")])

    def some() -> None:
        calls = [
            agent.client.begin(
                "CopyFiles",
                messages.CopyFilesRequest(
                    container_id="c1", files=[file("/etc/a"), file("/etc/b")]
                ),
            )
            for _ in range(3)
        ]
        for call in calls:
            agent.client.finish(call)
        read(agent, "/etc/a")

    some()
    before = agent.open_files()
    for _ in range(5):
        some()
    assert agent.open_files() == before


COPIES = [folder("/tree"), file("/tree/a", read_only=True)]


def test_where_a_renewal_goes() -> None:
    files = [file("/tree/b/c"), file("/tree/a"), folder("/tree")]
    plans = renewal.plan(COPIES, {"/tree": "/real"}, files)
    assert [(row.target, row.is_mount) for row in plans] == [
        ("/real/b/c", False),
        ("/tree/a", True),
        ("/real", False),
    ]


@given(st.text(alphabet="/.a\0~", max_size=12).map("/tree/".__add__))
def test_nothing_climbs_out_of_a_copied_directory(destination: str) -> None:
    try:
        plans = renewal.plan(COPIES, {}, [file(destination)])
    except CallerError:
        return
    assert plans[0].target == destination == os.path.normpath(destination)


def test_merging_keeps_what_was_to_be_read_only() -> None:
    files = [folder("/d"), file("/d/a"), file("/b", read_only=True), folder("/d", read_only=True)]
    merged = renewal.merge(files, [file("/b", b"new"), file("/d/c")])
    assert [(row.destination, row.read_only) for row in merged] == [
        ("/d", True),
        ("/d/a", False),
        ("/b", True),
        ("/d/c", False),
    ]
    assert merged[2].content == b"new"
