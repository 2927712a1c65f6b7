"""The command lines of both programs named virtiofsd: each jail option is there, in its words."""

from __future__ import annotations

import resource

import pytest

from vmcell_shim.virtiofsd import OPEN_FILES, command


@pytest.fixture(autouse=True)
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))


def test_the_program_of_qemu() -> None:
    assert command("/usr/lib/qemu/virtiofsd", "/run/x/share") == [
        "/usr/lib/qemu/virtiofsd",
        *("--fd=3", "--thread-pool-size=4", f"--rlimit-nofile={OPEN_FILES}"),
        *("-o", "source=/run/x/share", "-o", "sandbox=namespace", "-o", "cache=auto"),
        *("-o", "announce_submounts", "-o", "no_xattr", "-o", "no_posix_lock", "-o", "no_flock"),
        *("-o", "modcaps=-mknod:-setfcap", "-o", "log_level=warn"),
    ]


def test_the_program_in_rust() -> None:
    assert command("/usr/libexec/virtiofsd", "/run/x/share") == [
        "/usr/libexec/virtiofsd",
        *("--fd=3", "--thread-pool-size=4", f"--rlimit-nofile={OPEN_FILES}"),
        *("--shared-dir=/run/x/share", "--sandbox=namespace", "--seccomp=kill", "--cache=auto"),
        *("--announce-submounts", "--inode-file-handles=never", "--modcaps=-mknod:-setfcap"),
        "--log-level=warn",
    ]


def test_no_more_files_than_we_may_open_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 20_000))
    assert "--rlimit-nofile=20000" in command("/usr/libexec/virtiofsd", "/x")
