"""Each row of `vmcell doctor` on hosts made of files."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from zygote_harness import Zygote

from vmcell_protos.zygote import ALIVE, MAX_DATAGRAM_BYTES, REFUSED, Answer, encode_answer
from vmcell_shim.config import ShimConfig, render_config
from vmcell_tools import doctor, local_ca
from vmcell_tools.containerd_config import SNIPPETS, merged
from vmcell_tools.doctor import Host, examine
from vmcell_tools.ingress_setup import set_up_tls
from vmcell_tools.local_ca import ensure_certificate
from vmcell_tools.setup_host import shim_executable


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A root with nothing in it and a PATH with no program."""
    (tmp_path / "bin").mkdir()
    return Host(root=tmp_path, path=str(tmp_path / "bin"))


def put(host: Host, path: str, text: str = "", *, mode: int = 0o644) -> None:
    file = host.at(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def program(host: Host, name: str, script: str) -> None:
    put(host, f"bin/{name}", f"#!/bin/sh\n{script}\n", mode=0o755)


def test_an_empty_host_fails_with_advice_for_all_that_is_needed(host: Host) -> None:
    rows = {row.what: row for row in examine(host)}
    needed = ("KVM", "containerd", "containerd socket", "shim", "config.toml", "kernel")
    for what in (*needed, "base image", "cgroups", "nftables", "TAP", "image tools"):
        assert rows[what].status == "fail", what
    for what in ("vhost-net", "nginx", "CRI runtime", "image cache", "zygote"):
        assert rows[what].status == "warn", what
    assert all(row.advice for row in rows.values() if row.status != "ok")


@pytest.mark.parametrize(
    ("machine", "release", "status", "word"),
    [
        ("x86_64", "6.1.0-38-amd64", "ok", ""),
        ("x86_64", "5.12.0", "ok", ""),
        ("x86_64", "5.10.0-30-amd64", "warn", "5.12 or later"),
        ("x86_64", "odd", "warn", "5.12 or later"),
        ("aarch64", "6.12.1", "fail", "x86-64"),
    ],
)
def test_linux_and_processor(
    host: Host, machine: str, release: str, status: str, word: str
) -> None:
    row = doctor.linux(replace(host, machine=machine, release=release))
    assert (row.status, row.found) == (status, f"{release} on {machine}")
    assert word in row.advice
    assert row in examine(replace(host, machine=machine, release=release))


@pytest.mark.parametrize(
    ("module", "flags", "status", "word"),
    [
        ("kvm_pvm", "fpu", "fail", "vmcell dev up"),
        ("kvm_pvm", "fpu svm", "fail", "vmcell dev up"),
        ("kvm_amd", "fpu svm", "ok", ""),
        ("kvm", "fpu", "fail", "firmware"),
    ],
)
def test_kvm_kinds(host: Host, module: str, flags: str, status: str, word: str) -> None:
    put(host, "dev/kvm", mode=0o600)
    put(host, f"sys/module/{module}/refcnt")
    put(host, "proc/cpuinfo", f"processor : 0\nflags : {flags}\n")
    row = doctor.kvm(host)
    assert row.status == status
    assert word in row.advice


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1", "ok"),
        ("containerd github.com/containerd/containerd/v2 v2.0.4 1a43cb6", "ok"),
        ("containerd github.com/containerd/containerd 1.4.13~ds1 x", "fail"),
        ("something else", "warn"),
    ],
)
def test_containerd_versions(host: Host, version: str, status: str) -> None:
    program(host, "containerd", f"echo '{version}'")
    assert doctor.containerd(host).status == status


def test_a_socket_counts_only_when_it_answers(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    path = host.at(doctor.CONTAINERD_SOCKET)
    path.parent.mkdir(parents=True)
    # A path of sun_path's length whatever tmp_path is.
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(doctor, "CONTAINERD_SOCKET", path.name)
    here = Host(root=Path())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
        assert doctor.containerd_socket(here).status == "fail"
        listener.listen()
        assert doctor.containerd_socket(here).status == "ok"


def test_a_shim_of_another_checkout_is_a_warning(host: Host) -> None:
    put(host, "usr/local/bin/containerd-shim-vmcell-v2", shim_executable())
    assert doctor.shim(host).status == "ok"
    put(host, "usr/local/bin/containerd-shim-vmcell-v2", "#!/bin/sh\n")
    assert doctor.shim(host).status == "warn"


def zygote_row(path: str) -> doctor.Row:
    """The row for a zygote at `path`, from a directory that makes it short enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.path.dirname(path))
        patch.setattr(doctor, "SOCKET_PATH", os.path.basename(path))
        return doctor.zygote(Host(root=Path()))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (encode_answer(Answer(ALIVE, number=7, output=b"/other/shim")), "7 is of another checkout"),
        (encode_answer(Answer(REFUSED)), "another checkout"),
        (b"nonsense", "does not answer"),
        (b"", "does not answer"),
    ],
)
def test_a_zygote_of_no_use_is_a_warning(tmp_path: Path, answer: bytes, words: str) -> None:
    path = str(tmp_path / "z")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(MAX_DATAGRAM_BYTES)
                if answer:
                    connection.send(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        row = zygote_row(path)
        thread.join(20)
    assert row.status == "warn"
    assert words in row.found
    assert row.advice.startswith("restart it; ")


def test_a_zygote_that_answers(tmp_path: Path) -> None:
    running = Zygote(str(tmp_path / "z"))
    running.start()
    try:
        assert zygote_row(running.path).status == "ok"
        assert str(running.pid) in zygote_row(running.path).found
    finally:
        running.kill()
    assert zygote_row(running.path).found == "not running"


def test_configuration_and_what_it_names(host: Host) -> None:
    config = ShimConfig(kernel="/k/vmlinux", base_image="/b/base.erofs")
    put(host, "etc/vmcell/config.toml", render_config(config))
    assert doctor.configuration(host).status == "ok"
    assert doctor.kernel(host).status == doctor.base_image(host).status == "fail"
    assert "/k/vmlinux is missing" in doctor.kernel(host).found
    put(host, "k/vmlinux")
    put(host, "b/base.erofs")
    assert doctor.kernel(host).status == doctor.base_image(host).status == "ok"
    put(host, "etc/vmcell/config.toml", "kernel = 3\n")
    assert doctor.configuration(host).status == "fail"
    assert "kernel is 3" in doctor.configuration(host).found


@pytest.mark.parametrize(
    ("v1", "v2", "status", "found"),
    [
        ("", "cpu io memory pids", "ok", "v2: cpu, memory, pids"),
        ("cpu,cpuacct memory pids", None, "ok", "v1: "),
        ("memory pids", "cpu", "ok", "v1 and v2: "),
        ("", "cpu io", "fail", "without memory, pids"),
        ("cpu", "", "fail", "without memory, pids"),
        ("", None, "fail", "no cgroup hierarchy"),
    ],
)
def test_cgroups(host: Host, v1: str, v2: str | None, status: str, found: str) -> None:
    lines = [
        f"32 31 0:29 / /sys/fs/cgroup/{names} rw - cgroup cgroup rw,{names}\n"
        for names in v1.split()
    ]
    if v2 is not None:
        place = host.at("unified")
        lines.append(f"41 31 0:38 / {place} rw - cgroup2 cgroup2 rw\n")
        put(host, "unified/cgroup.controllers", f"{v2}\n")
    put(host, "proc/self/mountinfo", "".join(lines))
    row = doctor.cgroup(host)
    assert row.status == status
    assert found in row.found


def jailing(host: Host, *, uid_map: str = "0 0 4294967295", actions: str = "trap errno") -> None:
    put(host, "proc/sys/kernel/seccomp/actions_avail", f"kill_process kill_thread {actions} allow")
    put(host, "proc/self/uid_map", uid_map)
    for name in ("ipc", "mnt", "net", "uts"):
        put(host, f"proc/self/ns/{name}")


def test_a_host_that_can_jail(host: Host) -> None:
    jailing(host)
    put(host, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nbroken\n+::::::\n")
    put(host, "etc/subuid", "user:100000:65536\n")
    row = doctor.jail(host)
    assert (row.status, row.found) == ("ok", "uids 2000000000 to 2000032767, system call filters")


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("proc/sys/kernel/seccomp/actions_avail", "kill_process allow", "no system call filters"),
        ("proc/self/uid_map", "0 100000 65536", "do not all exist"),
        ("proc/self/uid_map", "0 0 2000000100", "do not all exist"),
        ("etc/passwd", "eve:x:2000000007:100::/:/bin/sh\n", "meet eve of /etc/passwd"),
        ("etc/group", "eve:x:2000032767:\n", "meet eve of /etc/group"),
        ("etc/subuid", "pod:1999999000:1001\n", "meet pod of /etc/subuid"),
        ("etc/subgid", "pod:2000000100:10\n", "meet pod of /etc/subgid"),
    ],
)
def test_what_a_jail_lacks_is_said(host: Host, path: str, text: str, found: str) -> None:
    jailing(host)
    put(host, path, text)
    row = doctor.jail(host)
    assert row.status == "fail"
    assert found in row.found
    assert row.advice


def test_a_jail_needs_namespaces(host: Host) -> None:
    jailing(host)
    host.at("proc/self/ns/ipc").unlink()
    assert doctor.jail(host).found == "no ipc namespaces"


def test_the_jail_looks_at_the_configured_range(host: Host) -> None:
    jailing(host)
    config = ShimConfig(kernel="/k", base_image="/b", vmm_uid_first=70000, vmm_uid_count=100)
    put(host, "etc/vmcell/config.toml", render_config(config))
    assert doctor.jail(host).found.startswith("uids 70000 to 70099")
    put(host, "etc/subuid", "user:65536:65536\n")
    assert doctor.jail(host).status == "fail"


def test_the_runtime_in_containerds_configuration(host: Host) -> None:
    put(host, "etc/containerd/config.toml", merged("version = 2\n", SNIPPETS[0]))
    assert doctor.kubernetes(host).status == "ok"
    put(host, "etc/containerd/config.toml", "version = 2\n")
    assert "vmcell setup --containerd" in doctor.kubernetes(host).advice
    put(host, "etc/containerd/config.toml", "version = ")
    assert "not TOML" in doctor.kubernetes(host).found


def test_the_image_cache(host: Host) -> None:
    config = ShimConfig(kernel="/k", base_image="/b", cache_dir="/cache", cache_limit_mib=1)
    put(host, "etc/vmcell/config.toml", render_config(config))
    row = doctor.image_cache(host)
    assert (row.status, row.found) == ("ok", "0 images, 0 of 1 MiB")
    put(host, "cache/erofs/KEY.erofs", "no image at all")
    row = doctor.image_cache(host)
    assert (row.status, row.advice) == ("warn", "vmcell cache prune")
    put(host, "cache2", "a file")
    config = ShimConfig(kernel="/k", base_image="/b", cache_dir="/cache2")
    put(host, "etc/vmcell/config.toml", render_config(config))
    assert doctor.image_cache(host).status == "warn"


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (1, "fail")])
def test_nftables_must_answer(host: Host, code: int, status: str) -> None:
    program(host, "nft", f'[ "$1" = list ] && exit {code}; echo v1')
    assert doctor.nftables(host).status == status


def test_a_program_that_hangs_is_a_failure(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "COMMAND_DEADLINE_S", 0.2)
    program(host, "nft", "exec sleep 1000")
    assert doctor.nftables(host).status == "fail"


def test_devices_and_tools(host: Host) -> None:
    put(host, "dev/net/tun")
    put(host, "dev/vhost-net")
    assert doctor.live_directories(host).status == "warn"
    put(host, "usr/libexec/virtiofsd")
    assert doctor.live_directories(host).status == "ok"
    for name in ("mkfs.erofs", "mkfs.ext4", "nginx"):
        program(host, name, "true")
    for check in (doctor.tun, doctor.vhost_net, doctor.image_tools, doctor.nginx):
        assert check(host).status == "ok"


def test_disk_rows_look_where_the_cache_will_be(host: Host) -> None:
    assert str(host.root) in doctor.free_disk(host).found
    assert list(host.root.iterdir()) == [host.root / "bin"]
    row = doctor.reflink(host)
    assert row.status in ("ok", "warn")
    assert bool(row.advice) == (row.status == "warn")


def test_a_full_disk_fails(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FREE_GIB_FAIL", 1 << 30)
    assert doctor.free_disk(host).status == "fail"


def test_the_certificate_of_api_toml(host: Host) -> None:
    assert doctor.certificate(host).status == "ok", "none is needed"
    (host.root / "bin/openssl").symlink_to("/usr/bin/openssl")
    set_up_tls(host.root, "sbx.example:8443")
    row = doctor.certificate(host)
    assert (row.status, "*.sbx.example" in row.found) == ("ok", True)
    (host.root / "etc/vmcell/tls/server.key").unlink()
    assert doctor.certificate(host).status == "fail"
    text = host.at("etc/vmcell/api.toml").read_text()
    ensure_certificate(host.root / "etc/vmcell/tls", "sbx.example")
    put(host, "etc/vmcell/api.toml", text.replace("sbx.example", "box.example"))
    row = doctor.certificate(host)
    assert (row.status, "not for *.box.example" in row.found) == ("fail", True)
    put(host, "etc/vmcell/api.toml", "colour = 1")
    assert doctor.certificate(host).status == "warn"


def test_a_certificate_that_ends_soon(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (host.root / "bin/openssl").symlink_to("/usr/bin/openssl")
    monkeypatch.setattr(local_ca, "SERVER_DAYS", 20)
    set_up_tls(host.root, "sbx.example")
    row = doctor.certificate(host)
    assert (row.status, "setup --tls-domain sbx.example" in row.advice) == ("warn", True)
