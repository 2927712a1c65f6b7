"""Files and directories through the unmodified Python SDK."""

from __future__ import annotations

import io
import os

import pytest
from e2b import FileType, NotEnoughSpaceException, Sandbox
from e2b.exceptions import (
    AuthenticationException,
    FileNotFoundException,
    InvalidArgumentException,
    SandboxException,
)
from envd_harness import Envd

pytestmark = pytest.mark.root

ROOT_HOME = "/root"
SECRET = f"{ROOT_HOME}/secret"


@pytest.mark.parametrize("octet_stream", [False, True])
@pytest.mark.parametrize("size", [0, 1, 1 << 20, 5_000_001])
def test_bytes_come_back_equal(sandbox: Sandbox, size: int, octet_stream: bool) -> None:
    data = os.urandom(size)
    written = sandbox.files.write("deep/er/file.bin", data, use_octet_stream=octet_stream)
    assert (written.name, written.path) == ("file.bin", "/home/user/deep/er/file.bin")
    assert sandbox.files.read("deep/er/file.bin", format="bytes") == data
    assert b"".join(sandbox.files.read("deep/er/file.bin", format="stream")) == data


def test_streamed_and_packed_both_ways(sandbox: Sandbox) -> None:
    data = os.urandom(300_000) + b"a" * 3_000_000
    sandbox.files.write("/tmp/streamed", io.BytesIO(data))
    assert sandbox.files.read("/tmp/streamed", format="bytes", gzip=True) == data
    sandbox.files.write("/tmp/packed", data, gzip=True)
    assert sandbox.files.read("/tmp/packed", format="bytes") == data


def test_many_files_in_one_request(sandbox: Sandbox) -> None:
    entries = [{"path": f"/tmp/many/d{n}/f \u00e9 {n}", "data": f"text {n}"} for n in range(12)]
    written = sandbox.files.write_files(entries)  # type: ignore[arg-type]
    assert [info.path for info in written] == [entry["path"] for entry in entries]
    assert sandbox.files.read("/tmp/many/d7/f \u00e9 7") == "text 7"


def test_a_shorter_text_replaces_a_longer_one(sandbox: Sandbox, envd: Envd) -> None:
    sandbox.files.write("/tmp/replace", "long text")
    inode = envd.path("/tmp/replace").stat().st_ino
    sandbox.files.write("/tmp/replace", "x")
    assert sandbox.files.read("/tmp/replace") == "x"
    assert envd.path("/tmp/replace").stat().st_ino == inode


def test_owner_and_mode(sandbox: Sandbox, envd: Envd) -> None:
    sandbox.files.write("own/dir/file", "x")
    for name in ("own", "own/dir", "own/dir/file"):
        status = envd.path(f"/home/user/{name}").stat()
        assert (status.st_uid, status.st_gid) == (1000, 1000)
        assert status.st_mode & 0o777 == (0o644 if name.endswith("file") else 0o755)
    sandbox.files.write(SECRET, "x", user="root")
    assert envd.path(SECRET).stat().st_uid == 0
    assert sandbox.files.read(SECRET) == "x"
    assert sandbox.files.get_info(SECRET).owner == "root"
    sandbox.files.write("/app/src/main.py", "pass")
    result = sandbox.commands.run("stat -c %U /app /app/src /app/src/main.py; echo 1 >>/app/src/x")
    assert result.stdout.split() == ["user"] * 3
    sandbox.files.remove("/app")
    sandbox.files.remove(SECRET)


def test_files_of_proc_are_read_to_their_end(sandbox: Sandbox) -> None:
    assert len(sandbox.files.read("/proc/sys/kernel/random/boot_id").strip()) == 36
    assert "MemTotal" in sandbox.files.read("/proc/meminfo")


def test_missing_wrong_and_full(sandbox: Sandbox, envd: Envd) -> None:
    with pytest.raises(FileNotFoundException, match="path '/no/such' does not exist"):
        sandbox.files.read("/no/such")
    with pytest.raises(InvalidArgumentException, match="is a directory"):
        sandbox.files.read("/tmp")
    with pytest.raises(InvalidArgumentException, match="is a directory"):
        sandbox.files.write("/tmp", "x")
    with pytest.raises(AuthenticationException, match="error looking up user 'who'"):
        sandbox.files.read("/tmp/x", user="who")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write("/proc/version/x", "x")
    with pytest.raises(InvalidArgumentException, match="not a regular file"):
        sandbox.files.read("/dev/zero")
    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("/low/big", b"x" * (2 << 20))
    assert not envd.path("/low/big").exists()
    sandbox.files.write("/low/small", b"x")
    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("/low/big", b"x" * (2 << 20), use_octet_stream=True)
    assert not envd.path("/low/big").exists()


def test_list_by_depth_in_order(sandbox: Sandbox) -> None:
    for path in ("b/x/1", "b/y", "a", "c/z"):
        sandbox.files.write(f"/tmp/list/{path}", "x")
    assert [e.name for e in sandbox.files.list("/tmp/list")] == ["a", "b", "c"]
    deep = [e.path.removeprefix("/tmp/list/") for e in sandbox.files.list("/tmp/list", depth=2)]
    assert deep == ["a", "b", "b/x", "b/y", "c", "c/z"]
    assert len(sandbox.files.list("/tmp/list", depth=9)) == 7
    with pytest.raises(FileNotFoundException):
        sandbox.files.list("/tmp/list/none")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list("/tmp/list/a")


def test_entry_info(sandbox: Sandbox, envd: Envd) -> None:
    sandbox.files.write("/tmp/info/file", "12345")
    sandbox.commands.run("cd /tmp/info; chmod 640 file; ln -s file link; ln -s none dangling")
    info = sandbox.files.get_info("/tmp/info/file")
    status = envd.path("/tmp/info/file").stat()
    assert (info.type, info.size, info.mode) == (FileType.FILE, 5, 0o640)
    assert (info.permissions, info.owner, info.group) == ("-rw-r-----", "user", "user")
    # A datetime holds microseconds.
    assert abs(info.modified_time.timestamp() - status.st_mtime) < 0.001
    link = sandbox.files.get_info("/tmp/info/link")
    assert (link.symlink_target, link.permissions) == ("/tmp/info/file", "Lrwxrwxrwx")
    assert (link.type, link.mode, link.size) == (FileType.SYMLINK, 0o640, 4)
    assert sandbox.files.get_info("/tmp/info/dangling").symlink_target == "/tmp/info/dangling"
    assert sandbox.files.get_info("/tmp/info").type == FileType.DIR
    assert sandbox.files.get_info("/").path == "/"


def test_exists_make_dir_rename_remove(sandbox: Sandbox) -> None:
    assert sandbox.files.make_dir("/tmp/made/by/hand")
    assert sandbox.files.make_dir("/tmp/made/by/hand") is False
    sandbox.files.write("/tmp/made/file", "x")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.make_dir("/tmp/made/file")
    assert sandbox.files.exists("/tmp/made/by")
    moved = sandbox.files.rename("/tmp/made/by", "/tmp/made/new/parent/by")
    assert (moved.path, moved.type) == ("/tmp/made/new/parent/by", FileType.DIR)
    assert not sandbox.files.exists("/tmp/made/by")
    assert sandbox.files.exists("/tmp/made/new/parent/by/hand")
    with pytest.raises(FileNotFoundException):
        sandbox.files.rename("/tmp/made/none", "/tmp/made/x")
    sandbox.files.remove("/tmp/made")
    assert not sandbox.files.exists("/tmp/made")
    sandbox.files.remove("/tmp/made")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.remove("/")


def test_a_tree_moves_to_another_file_system(sandbox: Sandbox) -> None:
    sandbox.commands.run(
        "mkdir -p /tmp/far/d && cd /tmp/far && echo text >d/f && chmod 700 d/f && ln -s f d/l"
        " && touch -d @1000000000 d/f"
    )
    sandbox.files.rename("/tmp/far", "/low/near/far")
    assert not sandbox.files.exists("/tmp/far")
    info = sandbox.files.get_info("/low/near/far/d/f")
    assert (info.permissions, info.modified_time.timestamp()) == ("-rwx------", 1e9)
    assert sandbox.files.read("/low/near/far/d/l") == "text\n"
    # Does not fit: nothing has moved, nothing is left at the destination.
    sandbox.commands.run("mkdir /tmp/fat; head -c 2000000 /dev/zero >/tmp/fat/file; echo 1 >/low/x")
    with pytest.raises(SandboxException):
        sandbox.files.rename("/tmp/fat", "/low/fat")
    assert sandbox.files.exists("/tmp/fat/file")
    assert {e.name for e in sandbox.files.list("/low")} >= {"near", "x"}
    assert not [e for e in sandbox.files.list("/low") if "fat" in e.name or ".move" in e.name]


def test_removing_a_tree_follows_no_link(sandbox: Sandbox) -> None:
    sandbox.commands.run(
        "mkdir -p /tmp/keep /tmp/gone/d && touch /tmp/keep/file && ln -s /tmp/keep /tmp/gone/d/l "
        "&& for i in $(seq 2000); do : >/tmp/gone/d/$i; done"
    )
    sandbox.files.remove("/tmp/gone")
    assert not sandbox.files.exists("/tmp/gone")
    assert sandbox.files.exists("/tmp/keep/file")


def test_metadata(sandbox: Sandbox) -> None:
    written = sandbox.files.write("/tmp/meta", "x", metadata={"Author": "me", "purpose": "a b"})
    assert written.metadata == {"author": "me", "purpose": "a b"}
    assert sandbox.files.get_info("/tmp/meta").metadata == {"author": "me", "purpose": "a b"}
    sandbox.files.write("/tmp/meta", "x", metadata={"other": "1"})
    assert sandbox.files.get_info("/tmp/meta").metadata == {"other": "1"}
    sandbox.files.write("/tmp/meta", "x")
    assert sandbox.files.get_info("/tmp/meta").metadata is None
