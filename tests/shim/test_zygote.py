"""The real zygote and the real binary: what the binary answers, whatever becomes of the zygote.

That the zygote did it is seen by a binary that can do nothing by itself, or by who listens.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_harness import wait_until
from thread_stacks import stacks_of_default_size
from zygote_harness import (
    BINARY,
    NO_ZYGOTE_STATUS,
    ONLY_BY_ZYGOTE,
    SOURCE_ROOTS,
    Zygote,
    address_of,
    bootstrap,
    delete_words,
    end,
    make_bundle,
    only_server,
    parent,
    server_pid,
    settled_traits,
    shims,
    start,
    start_words,
    state,
    variant,
)

from vmcell_protos.bootstrap import RuntimeInfo
from vmcell_protos.task import DeleteResponse
from vmcell_protos.zygote import ALIVE, MAX_DATAGRAM_BYTES, REFUSED, decode_answer
from vmcell_shim.living import identify
from vmcell_shim.sandbox_files import SandboxFiles

pytestmark = pytest.mark.root

# What a direct run may take beside the deadline, on a machine with other things to do.
DIRECT_S = 3.0


def test_no_stack_of_a_thread_has_room_for_a_huge_page(zygote: Zygote, bundle: Path) -> None:
    pid = only_server(bundle, start(zygote, bundle))
    assert settled_traits(pid)["Threads"] == ["2"]
    assert stacks_of_default_size(pid) == 0


def test_start_and_delete_are_done_by_it(zygote: Zygote, bundle: Path, folder: Path) -> None:
    binary = variant(folder / "only", ONLY_BY_ZYGOTE)
    address = start(zygote, bundle, binary)
    pid = only_server(bundle, address)
    assert (server_pid(address), parent(pid)) == (pid, zygote.pid)
    end(pid)
    done = zygote.run(bundle, *delete_words(bundle), binary=binary)
    assert (done.returncode, done.stderr) == (0, b"")
    assert DeleteResponse.decode(done.stdout).exit_status == 137
    assert os.listdir(bundle / "s") == [], "the dead server's socket is gone"
    zygote.kill()
    for words in (start_words(bundle), delete_words(bundle)):
        assert zygote.run(bundle, *words, binary=binary).returncode == NO_ZYGOTE_STATUS


def test_delete_kills_what_lives(zygote: Zygote, bundle: Path, folder: Path) -> None:
    files = SandboxFiles(str(folder / "run/default/c1"))
    files.create(str(bundle))
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        files.vmm = identify(sleeper.pid)
        files.save()
        binary = variant(folder / "only", ONLY_BY_ZYGOTE)
        done = zygote.run(bundle, *delete_words(bundle), binary=binary)
        assert DeleteResponse.decode(done.stdout).pid == sleeper.pid
        assert sleeper.wait(5) == -signal.SIGKILL
    assert not (folder / "run/default").exists()


def test_the_plain_address_of_older_containerd(zygote: Zygote, bundle: Path, folder: Path) -> None:
    binary = variant(folder / "only", ONLY_BY_ZYGOTE)
    done = zygote.run(bundle, *start_words(bundle), binary=binary)
    assert done.stdout.startswith(b"unix:///run/containerd/s/")
    assert len(shims(bundle)) == 1
    os.unlink(done.stdout.decode().removeprefix("unix://"))


def test_errors_and_other_actions_are_as_without_it(zygote: Zygote, bundle: Path) -> None:
    direct = Zygote(zygote.path)
    direct.environment["VMCELL_ZYGOTE"] = ""
    (bundle / "config.json").write_text(
        json.dumps({"annotations": {"io.kubernetes.cri.sandbox-id": "pod1"}})
    )
    for words in (
        start_words(bundle),
        ["-id", "../x", "-namespace", "default", "start"],
        ["-nonsense", "start"],
        ["start"],
        ["delete"],
        ["-v"],
        [],
    ):
        with_it, without = zygote.run(bundle, *words), direct.run(bundle, *words)
        assert with_it.stderr == without.stderr
        assert (with_it.returncode, with_it.stdout) == (without.returncode, without.stdout)
    assert RuntimeInfo.decode(zygote.run(bundle, "-info").stdout).name == "io.containerd.vmcell.v2"


CALLER = """
import os, resource, signal, sys
os.umask(0o027)
os.setgroups([7, 5])
os.nice(3)
resource.setrlimit(resource.RLIMIT_NOFILE, (777, 1777))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
open("/proc/self/oom_score_adj", "w").write("123")
os.set_inheritable(os.open("/dev/zero", os.O_RDONLY), True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_shim_is_what_it_would_be_without_it(
    zygote: Zygote, bundle: Path, tmp_path: Path
) -> None:
    """Its caller has an umask, limits, a priority and open files of its own."""
    seen = []
    for path in (zygote.path, ""):
        done = subprocess.run(
            [*(sys.executable, "-c", CALLER, sys.executable, "-ISB", BINARY), *start_words(bundle)],
            cwd=bundle,
            env={**os.environ, "VMCELL_ZYGOTE": path},
            input=bootstrap(bundle),
            capture_output=True,
            timeout=30,
            check=False,
        )
        address = address_of(done)
        pid = only_server(bundle, address)
        assert (server_pid(address) == pid) == bool(path)
        seen.append(settled_traits(pid))
        end(pid)
    by_zygote, direct = seen
    assert by_zygote == direct
    nice = str(min(os.nice(0) + 3, 19))
    assert (by_zygote["nice"], by_zygote["Groups"]) == (nice, ["5", "7"])
    assert by_zygote["oom_score_adj"] == "124\n", "one more than its caller's"
    assert "777" in str(by_zygote["limits"])


def test_the_environment_is_the_callers(zygote: Zygote, bundle: Path, folder: Path) -> None:
    """Seen by a `start` whose configuration of another time is looked for at another place."""
    change = (
        "from vmcell_shim import start\n"
        "def told(*_):\n"
        "    raise start.CallerError('-'.join("
        "f'{n}={v}' for n, v in sorted(start.os.environ.items()) if n in ('TTRPC_ADDRESS', 'LANG',"
        " 'NOTIFY_SOCKET', 'ONLY_OF_THE_ZYGOTE', 'VMCELL_ZYGOTE')))\n"
        "start.group_id = told\n"
    )
    zygote.kill()
    changed = Zygote(zygote.path, variant(folder / "changed", change))
    changed.start(environment={**changed.environment, "ONLY_OF_THE_ZYGOTE": "1"})
    changed.environment = {
        "TTRPC_ADDRESS": "/t",
        "LANG": "C.UTF-8",
        "VMCELL_ZYGOTE": zygote.path,
    }
    done = changed.run(bundle, *start_words(bundle))
    expected = f"LANG=C.UTF-8-TTRPC_ADDRESS=/t-VMCELL_ZYGOTE={zygote.path}\n"
    assert done.stderr == expected.encode()
    changed.kill()


@pytest.fixture
def unified() -> Iterator[Path]:
    """A cgroup of version 2 of one's own."""
    mounts = [Path(place) for place in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")]
    (mount,) = [place for place in mounts if (place / "cgroup.controllers").exists()]
    made = mount / f"vmcell-test-{os.getpid()}"
    made.mkdir()
    yield made
    for pid in (made / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: removed(made), "an empty cgroup")


def removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False  # somebody is still about to end in it
    return True


def in_cgroup(pid: int | str) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line[3:] for line in lines if line.startswith("0::"))


JOIN = 'echo $$ >"$0/cgroup.procs" && exec "$@"'


def start_in(zygote: Zygote, bundle: Path, *prefix: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*prefix, sys.executable, "-ISB", str(BINARY), *start_words(bundle)],
        cwd=bundle,
        env=zygote.environment,
        input=bootstrap(bundle),
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_the_shim_is_in_its_callers_cgroup(
    zygote: Zygote, bundle: Path, folder: Path, unified: Path
) -> None:
    """The first caller's becomes the zygote's too; children of another caller move."""
    address = address_of(start_in(zygote, bundle, "sh", "-c", JOIN, str(unified)))
    pid = server_pid(address)
    assert in_cgroup(pid) == in_cgroup(zygote.pid) == f"/{unified.name}"
    other = make_bundle(folder, "b2")
    address = address_of(start_in(zygote, other))
    assert in_cgroup(server_pid(address)) == in_cgroup("self") != f"/{unified.name}"
    os.kill(server_pid(address), signal.SIGKILL)


NAMESPACES = {
    "--net": "net",
    "--mount": "mnt",
    "--uts": "uts",
    "--ipc": "ipc",
    "--cgroup": "cgroup",
}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_caller_in_another_namespace_goes_direct(
    zygote: Zygote, bundle: Path, namespace: str
) -> None:
    address = address_of(start_in(zygote, bundle, "unshare", namespace))
    pid = only_server(bundle, address)
    assert server_pid(address) != pid
    assert parent(pid) != zygote.pid
    assert f"cannot have the {NAMESPACES[namespace]} namespace" in zygote.log.read_text()


def test_a_caller_with_fewer_rights_goes_direct(zygote: Zygote, bundle: Path) -> None:
    prefix = ("setpriv", "--bounding-set", "-sys_boot")
    address = address_of(start_in(zygote, bundle, *prefix))
    pid = only_server(bundle, address)
    assert server_pid(address) != pid
    status = Path(f"/proc/{pid}/status").read_text()
    own = Path("/proc/self/status").read_text()
    assert status.split("CapBnd:")[1].split()[0] != own.split("CapBnd:")[1].split()[0]


def test_another_user_is_not_heard(zygote: Zygote) -> None:
    """Not even one who may open the socket."""
    os.chmod(zygote.path, 0o666)
    os.chmod(os.path.dirname(zygote.path), 0o755)
    program = (
        f"import sys; sys.path[:0] = {SOURCE_ROOTS[:1]!r}\n"
        "import socket\n"
        "from vmcell_protos.zygote import HELLO, Request, encode_request\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"s.settimeout(10); s.connect({zygote.path!r})\n"
        "try:\n"
        "    s.send(encode_request(Request(HELLO, b'')))\n"
        "    print(len(s.recv(4096)))\n"
        "except OSError as error:\n"
        "    print(0)\n"
    )
    heard = [
        subprocess.run(
            ["setpriv", f"--reuid={uid}", "--clear-groups", "/usr/bin/python3", "-"],
            input=program.encode(),
            capture_output=True,
            timeout=20,
            check=False,
        )
        for uid in (0, 65534)
    ]
    assert int(heard[0].stdout) > 0, heard[0].stderr
    assert int(heard[1].stdout) == 0, heard[1].stderr
    assert "uid 65534 may not ask" in zygote.log.read_text()


def test_another_installation_goes_direct(zygote: Zygote, bundle: Path, folder: Path) -> None:
    other = variant(folder / "other", more_roots=("/somewhere/else",))
    address = start(zygote, bundle, other)
    assert server_pid(address) != only_server(bundle, address)
    assert "of another installation" in zygote.log.read_text()


def test_changed_code_is_noticed_at_once(folder: Path, bundle: Path) -> None:
    """The request that finds it out goes direct, with the new code; the next finds a new zygote."""
    roots = [folder / "code" / name for name in ("protos", "runtime", "shim")]
    for root in roots:
        shutil.copytree(
            Path(SOURCE_ROOTS[0]).parent / root.name,
            root,
            ignore=shutil.ignore_patterns("pb", "__pycache__"),
        )
    binary = roots[2] / BINARY.name
    zygote = Zygote(str(folder / "z"), binary)
    zygote.start()
    pid = zygote.pid
    address = start(zygote, bundle, binary)
    assert server_pid(address) == only_server(bundle, address)
    with (roots[1] / "vmcell_runtime/vmm.py").open("a") as module:
        module.write("# changed in place\n")
    other = make_bundle(folder, "b2")
    address = start(zygote, other, binary)
    assert server_pid(address) != only_server(other, address)
    wait_until(lambda: "renewed" in zygote.log.read_text(), "the renewal")
    assert (zygote.hello().kind, zygote.pid) == (ALIVE, pid)
    done = zygote.run(other, *delete_words(other), binary=binary)
    assert done.returncode == 0
    only = variant(roots[2] / "only", ONLY_BY_ZYGOTE)
    text = only.read_text().replace(str(SOURCE_ROOTS), str([str(root) for root in roots]))
    only.write_text(text)
    assert zygote.run(other, *delete_words(other), binary=only).returncode == 0
    os.unlink(binary)
    assert zygote.run(other, *delete_words(other), binary=only).returncode == NO_ZYGOTE_STATUS
    assert zygote.wait() == 0, "uninstalled, it ends"
    assert not os.path.exists(zygote.path)
    for found in (*shims(bundle), *shims(other)):
        os.kill(found, signal.SIGKILL)


# Strange company


def test_nonsense_is_refused_and_silence_is_borne(zygote: Zygote) -> None:
    before = zygote.descriptors()
    silent = [zygote.connect() for _ in range(80)]
    assert zygote.hello().kind == ALIVE
    assert len(zygote.descriptors()) <= len(before) + 64
    for nonsense in (b"x", bytes(MAX_DATAGRAM_BYTES), b"\xff" * 4000):
        with zygote.connect() as sock:
            sock.send(nonsense)
            assert decode_answer(sock.recv(MAX_DATAGRAM_BYTES)).kind == REFUSED
    with zygote.connect() as sock, open("/dev/null") as file:
        socket.send_fds(sock, [b"x"], [file.fileno()] * 10)
        assert decode_answer(sock.recv(MAX_DATAGRAM_BYTES)).kind == REFUSED
    for sock in silent:
        sock.close()
    wait_until(lambda: zygote.hello().kind == ALIVE and zygote.descriptors() == before, "no leak")


def test_a_second_one_waits_for_the_first_ones_end(zygote: Zygote, bundle: Path) -> None:
    second = Zygote(zygote.path)
    second.start(wait=False)
    wait_until(lambda: state(second.pid) == "S" and len(shared_memory(second.pid)) > 0, "a wait")
    assert zygote.hello().number == zygote.pid
    zygote.signal(signal.SIGTERM)
    wait_until(lambda: f"{second.pid}: listens on" in second.log.read_text(), "the second's turn")
    assert second.hello().number == second.pid
    second.kill()


def shared_memory(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_it_takes_no_arguments_and_needs_a_socket(folder: Path) -> None:
    for variables, words, sentence in (
        ({"VMCELL_ZYGOTE": str(folder / "z")}, ["now"], b"zygote takes no arguments"),
        ({"VMCELL_ZYGOTE": ""}, [], b"VMCELL_ZYGOTE is ''"),
        ({"VMCELL_ZYGOTE": str(folder / ("x" * 160))}, [], b"cannot look at"),
    ):
        done = subprocess.run(
            [sys.executable, "-ISB", str(BINARY), "zygote", *words],
            env={**os.environ, **variables},
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, b"")
        assert sentence in done.stderr
        assert done.stderr.count(b"\n") == 1
