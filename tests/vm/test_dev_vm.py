"""What `vmcell dev` promises: a machine with real KVM, and commands as if they ran here."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
from dev_vm import DevVm

from vmcell_tools.dev_service import VMCELL
from vmcell_tools.dev_sync import CHECKOUT

pytestmark = pytest.mark.vm

# KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CREATE_VCPU (linux/kvm.h)
KVM_PROBE = """
import fcntl, os
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
print(fcntl.ioctl(kvm, 0xAE00, 0), fcntl.ioctl(vm, 0xAE41, 0) > 0)
"""


def test_kvm_makes_machines(dev_vm: DevVm) -> None:
    assert dev_vm.check("python3", "-I", "-c", KVM_PROBE).split() == ["12", "True"]


def test_doctor_is_content(dev_vm: DevVm) -> None:
    result = dev_vm.run(*VMCELL, "doctor", "--json")
    rows = json.loads(result.stdout)
    failed = [row for row in rows if row["status"] == "fail"]
    assert not failed
    assert result.code == 0
    vhost = next(row for row in rows if row["what"] == "vhost-net")
    assert vhost["status"] == "ok"


def test_cgroup_controllers_are_enabled_for_children(dev_vm: DevVm) -> None:
    enabled = dev_vm.check("cat", "/sys/fs/cgroup/cgroup.subtree_control").split()
    assert {"cpu", "memory", "pids", "io"} <= set(enabled)


def test_nat_verdict_maps_and_taps(dev_vm: DevVm) -> None:
    script = (
        "set -e; nft -f -; nft delete table ip probe;"
        " ip tuntap add dev probe0 mode tap vnet_hdr; tc qdisc add dev probe0 ingress;"
        " ip link delete probe0"
    )
    rules = b"""table ip probe {
        map verdicts { type ifname : verdict; }
        chain probe_forward { type filter hook forward priority 0; iifname vmap @verdicts; }
        chain probe_out { type nat hook postrouting priority srcnat; ct state new masquerade; }
    }"""
    dev_vm.check("sh", "-c", script, stdin=rules)


def test_containerd_runs_runc(dev_vm: DevVm) -> None:
    script = (
        "set -e; root=/var/lib/vmcell/probe; mkdir -p $root/bin; cp /bin/busybox $root/bin/sh;"
        " ctr run --rm --rootfs $root probe /bin/sh -c 'exit 6' </dev/null || echo status $?;"
        " rm -r $root"
    )
    assert dev_vm.check("sh", "-c", script) == "status 6\n"


def test_streams_and_status_pass_through(dev_vm: DevVm) -> None:
    data = os.urandom(1 << 20)
    result = dev_vm.run("sh", "-c", "cat; echo oops >&2; exit 9", stdin=data)
    assert (result.stdout, result.stderr, result.code) == (data, b"oops\n", 9)


def test_words_and_directory_arrive_whole(dev_vm: DevVm) -> None:
    result = dev_vm.check("sh", "-c", 'printf "%s|" "$@"; pwd', "-", "a b", "it's", "$HOME", "")
    assert result == f"a b|it's|$HOME||{os.getcwd()}\n"


def test_a_terminal_has_its_size(dev_vm: DevVm) -> None:
    """`-t` from a terminal here: the VM's terminal is as large, and the status comes back."""
    leader, follower = pty.openpty()
    try:
        command = [*VMCELL, "dev", "run", "--", "sh", "-c", "stty size; exit 4"]
        with subprocess.Popen(
            ["sh", "-c", 'stty rows 33 cols 99; exec "$@"', "-", *command],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            assert process.wait(60) == 4
        assert b"33 99" in os.read(leader, 4096)
    finally:
        os.close(leader)
        os.close(follower)


def test_a_deadline_ends_the_command_and_its_children(dev_vm: DevVm) -> None:
    mark = f"{uuid.uuid4().int % 10**6 + 10**6}"
    words = ("sh", "-c", f"sleep {mark} & sleep {mark}")
    result = dev_vm.run(*words, timeout_s=2)
    assert result.code == 124
    assert "ended after 2 s" in result.error_text
    assert dev_vm.run("pgrep", "-f", f"sleep {mark}$").code == 1


def test_what_the_vm_writes_stays_in_it(dev_vm: DevVm, tmp_path: Path) -> None:
    file = tmp_path / "host"
    file.write_text("from the host")
    shown = dev_vm.check("sh", "-c", f"cat {file}; echo changed >{file}; cat {file}")
    assert shown == "from the hostchanged\n"
    assert file.read_text() == "from the host"


def test_logs_are_on_the_host(dev_vm: DevVm) -> None:
    dev_vm.check("sh", "-c", "echo kept >/mnt/out/probe.log")
    assert (dev_vm.out / "probe.log").read_text() == "kept\n"
    assert "vmcell-dev: ready" in (dev_vm.out / "console.log").read_text()
    assert (dev_vm.out / "containerd.log").stat().st_size


def test_the_checkout_follows_the_host(dev_vm: DevVm) -> None:
    probe = CHECKOUT / "tests" / "support" / f"probe-{uuid.uuid4().hex}"
    try:
        for text in ("one", "two, longer"):
            probe.write_text(text)
            assert dev_vm.check("cat", str(probe)) == text
    finally:
        probe.unlink(missing_ok=True)
    assert dev_vm.run("test", "-e", str(probe)).code == 1


def test_loopback_servers_are_reached_from_the_host(dev_vm: DevVm) -> None:
    """A server on the VM's 127.0.0.1:3080 answers on the forwarded port, unless one runs there."""
    port = dev_vm.sandbox_url.rpartition(":")[2]
    script = (
        "ss -Hltn sport = 3080 | grep -q . ||"
        " { echo hello >/run/probe.txt; cd /run;"
        " setsid busybox httpd -p 127.0.0.1:3080 -h /run >/dev/null 2>&1 & }"
    )
    dev_vm.check("sh", "-c", script)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/probe.txt", timeout=5) as got:
                    assert got.read() == b"hello\n"
                    return
            except (OSError, TimeoutError):
                assert time.monotonic() < deadline
    finally:
        dev_vm.run("pkill", "-f", "busybox httpd -p 127.0.0.1:3080")


def test_up_again_says_that_it_is_up(dev_vm: DevVm) -> None:
    done = subprocess.run([*VMCELL, "dev", "up"], capture_output=True, text=True, check=True)
    assert "was up already" in done.stdout


def test_a_second_vm_that_dies_is_named_and_leaves_nothing(dev_vm: DevVm) -> None:
    """Its own name and ports; QEMU is killed under a command; `down` ends the rest."""
    name = ["--name", "probe"]
    subprocess.run([*VMCELL, "dev", "up", *name, "--memory-mib", "1024"], check=True, timeout=300)
    try:
        status = json.loads(subprocess.check_output([*VMCELL, "dev", "status", *name, "--json"]))
        command = [*VMCELL, "dev", "run", *name, "--", "sh", "-c", "echo begun; exec sleep 1000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"begun\n"
            os.kill(status["pid"], 9)
            assert process.wait(20) == 1
            assert b"dev VM 'probe' has ended" in process.stderr.read()
    finally:
        subprocess.run([*VMCELL, "dev", "down", *name], check=True, timeout=60)
    sockets = f"{Path(status['out']).parent}/"
    listed = subprocess.check_output(["ps", "-eo", "stat,args"], text=True).splitlines()
    assert not [line for line in listed if sockets in line and not line.startswith("Z")]


def test_a_deadline_of_up_shows_the_console_and_leaves_nothing(dev_vm: DevVm) -> None:
    name = ["--name", "hasty"]
    command = [*VMCELL, "dev", "up", *name, "--memory-mib", "1024", "--deadline", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "the deadline passed in step: " in done.stderr
    status = subprocess.run([*VMCELL, "dev", "status", *name], capture_output=True, check=False)
    assert status.returncode == 1
    listed = subprocess.check_output(["ps", "-eo", "stat,args"], text=True).splitlines()
    assert not [line for line in listed if "/hasty/" in line and not line.startswith("Z")]
