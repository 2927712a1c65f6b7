"""What the guest's kernel and images promise to programs, looked at from inside a container."""

from __future__ import annotations

import pytest
from dev_vm import BASE, DevVm

IN_BASE = {"image": BASE, "namespace": "vmcell"}
pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("nothing_left")]

MEANT_TO_BE_READ_KIB = 20_000
ALLOWED_GROWTH_KIB = 4_000
CACHED = "awk '/^Cached:/ {print $2}' /proc/meminfo"
READ_ALL = "find /usr/bin /usr/lib -type f -size +64k -exec cat {} + | wc -c"


def test_reading_the_image_fills_no_page_cache_of_the_guest(dev_vm: DevVm) -> None:
    """The mount options say dax=always even where a file is not; only `Cached` tells."""
    result = dev_vm.ctr_run("dax", "sh", "-c", f"{CACHED}; {READ_ALL}; {CACHED}", **IN_BASE)
    assert result.code == 0, result.error_text
    before_kib, read_bytes, after_kib = map(int, result.text.split())
    assert read_bytes // 1024 > MEANT_TO_BE_READ_KIB
    assert after_kib - before_kib < ALLOWED_GROWTH_KIB


def test_the_kernel_has_what_programs_expect(dev_vm: DevVm) -> None:
    script = (
        "ls /proc/self/ns; cut -f2 /proc/filesystems; ls -d /proc/sys/fs/mqueue /proc/sysvipc"
        " /proc/sys/kernel/io_uring_disabled /proc/sys/kernel/seccomp /proc/keys"
        " /proc/sys/net/ipv6 /proc/sys/fs/inotify /proc/sys/fs/fanotify"
    )
    result = dev_vm.ctr_run("has", "sh", "-c", script, **IN_BASE)
    assert result.code == 0, result.error_text
    found = set(result.text.split())
    assert {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} <= found
    assert {"erofs", "ext4", "overlay", "tmpfs", "fuse", "virtiofs", "mqueue"} <= found


def test_the_debian_image_is_as_its_recipe_says(dev_vm: DevVm) -> None:
    as_user = "id -un; pwd; touch mine; python3 -c 'import ssl, sqlite3, ctypes; print(40 + 2)'"
    script = 'dpkg --audit; stat -c %a /tmp; su - user -c "$0"'
    result = dev_vm.ctr_run("deb", "bash", "-c", script, as_user, **IN_BASE)
    assert result.code == 0, result.error_text
    assert result.text.split() == ["1777", "user", "/home/user", "42"]
