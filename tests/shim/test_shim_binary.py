"""The binary as containerd runs it: answers, descriptors, delete from any state."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_harness import wait_until

from vmcell_protos import task
from vmcell_protos.bootstrap import BootstrapParams, Options, RuntimeInfo
from vmcell_protos.wellknown import Any, Empty
from vmcell_shim.client import TtrpcClient
from vmcell_shim.living import identify
from vmcell_shim.sandbox_files import SandboxFiles

BINARY = Path(__file__).resolve().parents[2] / "shim/containerd-shim-vmcell-v2"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "log")
    return tmp_path


@pytest.fixture
def sockets() -> Iterator[str]:
    """A short directory for sockets: a socket's path has 106 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="vmcell-s") as directory:
        yield directory


def run(
    bundle: Path, *words: str, stdin: bytes = b"", timeout_s: float = 20
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-ISB", str(BINARY), *words]
    return subprocess.run(
        command, cwd=bundle, input=stdin, capture_output=True, timeout=timeout_s, check=False
    )


def start_words(bundle: Path, container_id: str = "c1") -> list[str]:
    return [
        *("-namespace", "default", "-address", f"{bundle}/containerd.sock"),
        *("-publish-binary", "/bin/false", "-id", container_id, "start"),
    ]


def bootstrap(sockets: str, container_id: str = "c1") -> bytes:
    params = BootstrapParams(instance_id=container_id, namespace="default", socket_dir=sockets)
    return params.encode()


def connect(address: str) -> TtrpcClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address.removeprefix("unix://"))
    return TtrpcClient(sock, "the shim")


def shut_down(address: str) -> None:
    """Ends the server behind `address` the way containerd does."""
    client = connect(address)
    try:
        request = task.ShutdownRequest(id="c1")
        client.call("containerd.task.v2.Task", "Shutdown", request, Empty, 10)
    finally:
        client.close()
    wait_until(lambda: not os.path.exists(address.removeprefix("unix://")), "the shim's end")


def test_start_of_containerd_2_3(bundle: Path, sockets: str) -> None:
    """BootstrapParams on stdin: JSON version 3, and its socket_dir is used."""
    done = run(bundle, *start_words(bundle), stdin=bootstrap(sockets))
    assert (done.returncode, done.stderr) == (0, b"")
    answer = json.loads(done.stdout)
    name = hashlib.sha256(f"{bundle}/containerd.sock/default/c1".encode()).hexdigest()
    address = f"unix://{sockets}/{name}"
    assert answer == {"version": 3, "address": address, "protocol": "ttrpc"}
    assert (bundle / "address").read_text() == address
    assert os.stat(f"{sockets}/{name}").st_mode & 0o777 == 0o600
    shut_down(address)


@pytest.mark.root
@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        Any(
            type_url="runtimeoptions.v1.Options", value=Options(config_path="/x").encode()
        ).encode(),
        b"\xff\xff\xff",
    ],
    ids=["nothing", "options", "nonsense"],
)
def test_start_of_older_containerd(bundle: Path, stdin: bytes) -> None:
    """1.6 to 2.2: the plain address and nothing else, whatever the options are."""
    done = run(bundle, *start_words(bundle), stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    address = done.stdout.decode()
    assert address == (bundle / "address").read_text()
    assert address.startswith("unix:///run/containerd/s/")
    shut_down(address)


def test_delete_removes_the_socket_of_a_killed_shim(bundle: Path, sockets: str) -> None:
    done = run(bundle, *start_words(bundle), stdin=bootstrap(sockets))
    client = connect(json.loads(done.stdout)["address"])
    request = task.ConnectRequest(id="c1")
    answer = client.call("containerd.task.v2.Task", "Connect", request, task.ConnectResponse, 10)
    delete(bundle)
    assert len(os.listdir(sockets)) == 1, "a socket that answers stays"
    os.kill(answer.shim_pid, signal.SIGKILL)
    wait_until(lambda: client.lost, "the end of the shim")
    client.close()
    delete(bundle)
    assert os.listdir(sockets) == []


def test_second_start_finds_the_first(bundle: Path, sockets: str) -> None:
    first = run(bundle, *start_words(bundle), stdin=bootstrap(sockets))
    second = run(bundle, *start_words(bundle), stdin=bootstrap(sockets))
    assert first.stdout == second.stdout
    shut_down(json.loads(first.stdout)["address"])


def test_stale_socket_is_replaced(bundle: Path, sockets: str) -> None:
    name = hashlib.sha256(f"{bundle}/containerd.sock/default/c1".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{sockets}/{name}")
    done = run(bundle, *start_words(bundle), stdin=bootstrap(sockets))
    assert done.returncode == 0, done.stderr
    shut_down(json.loads(done.stdout)["address"])


def test_server_keeps_no_descriptor(bundle: Path, sockets: str) -> None:
    """containerd reads the answer until the pipe ends; a descriptor kept would hold it up."""
    stray_read, stray_write = os.pipe()
    answer_read, answer_write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-ISB", str(BINARY), *start_words(bundle)],
        cwd=bundle,
        stdin=subprocess.PIPE,
        stdout=answer_write,
        stderr=answer_write,
        pass_fds=(stray_write,),
    )
    os.close(answer_write)
    os.close(stray_write)
    process.communicate(bootstrap(sockets), timeout=20)
    answer = b""
    for fd in (answer_read, stray_read):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll(5000):
            chunk = os.read(fd, 4096)
            if not chunk:
                break
            answer += chunk
        else:
            pytest.fail(f"the server keeps descriptor {fd}")
        os.close(fd)
    shut_down(json.loads(answer)["address"])


def test_environment_and_directory_do_not_matter(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A json.py in the bundle, or PYTHON* in the daemon's environment, is never looked at."""
    (bundle / "json.py").write_text("raise SystemExit('wrong json')")
    (bundle / "os.py").write_text("raise SystemExit('wrong os')")
    monkeypatch.setenv("PYTHONPATH", str(bundle))
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    done = run(bundle, "-namespace", "default", "-id", "c1", "-bundle", str(bundle), "delete")
    assert (done.returncode, done.stderr) == (0, b"")


def test_bundle_that_takes_no_file_leaves_no_server(bundle: Path, sockets: str) -> None:
    (bundle / "address").mkdir()
    done = run(bundle, *start_words(bundle), stdin=bootstrap(sockets))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"cannot write the shim's address into ")
    assert done.stderr.count(b"\n") == 1
    assert os.listdir(sockets) == []


def test_a_pods_members_have_one_shim(bundle: Path, sockets: str) -> None:
    spec = {"annotations": {"io.kubernetes.cri.sandbox-id": "pod1"}}
    (bundle / "config.json").write_text(json.dumps(spec))
    answers = [
        run(bundle, *start_words(bundle, name), stdin=bootstrap(sockets, name)).stdout
        for name in ("pod1", "c1", "c2")
    ]
    assert answers[0] == answers[1] == answers[2]
    shut_down(json.loads(answers[0])["address"])


@pytest.mark.root
def test_sandbox_bundle_without_a_container(bundle: Path) -> None:
    """containerd 2.x with `sandboxer = "shim"`: no config.json, and an answer of version 3."""
    place = bundle.parent / "io.containerd.sandbox.controller.v1.shim" / "test" / "p1"
    place.mkdir(parents=True)
    done = run(place, *start_words(place))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["version"], answer["protocol"]) == (3, "ttrpc")
    shut_down(answer["address"])


@pytest.mark.parametrize("words", [("start",), ("-id", "../x", "start"), ("-nonsense",), ()])
def test_bad_lines_are_one_sentence(bundle: Path, words: tuple[str, ...]) -> None:
    done = run(bundle, *words)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


def test_info_and_version(bundle: Path) -> None:
    info = RuntimeInfo.decode(run(bundle, "-info").stdout)
    assert info.name == "io.containerd.vmcell.v2"
    assert b"Version:" in run(bundle, "-v").stdout


def delete(bundle: Path) -> tuple[task.DeleteResponse, float]:
    began = time.monotonic()
    words = ("-namespace", "default", "-id", "c1", "-bundle", str(bundle), "delete")
    done = run(bundle, *words)
    assert (done.returncode, done.stderr) == (0, b"")
    return task.DeleteResponse.decode(done.stdout), time.monotonic() - began


def test_delete_where_nothing_ever_was(bundle: Path) -> None:
    response, _ = delete(bundle)
    assert (response.pid, response.exit_status) == (0, 137)
    assert response.exited_at is not None


def sandbox(bundle: Path) -> SandboxFiles:
    """A sandbox's files with nothing alive yet."""
    files = SandboxFiles(str(bundle / "run/default/c1"))
    own = bundle / "cache/sandboxes/default/c1"
    own.mkdir(parents=True)
    (own / "vmcell.ext4").write_text("writes")
    files.owned = [str(own)]
    files.create(str(bundle))
    return files


def test_delete_kills_what_lives_and_may_run_twice(bundle: Path) -> None:
    files = sandbox(bundle)
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    files.shim, files.vmm = (identify(process.pid) for process in processes)
    files.save()
    response, elapsed_s = delete(bundle)
    assert response.pid == processes[1].pid
    assert elapsed_s < 1.0
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL] * 2
    assert not (bundle / "run/default").exists()
    assert not (bundle / "cache/sandboxes/default").exists()
    assert delete(bundle)[0].pid == 0


def test_delete_spares_a_pid_given_to_another_process(bundle: Path) -> None:
    files = sandbox(bundle)
    innocent = subprocess.Popen(["sleep", "600"])
    try:
        living = identify(innocent.pid)
        files.vmm = living._replace(start_ticks=living.start_ticks - 1)
        files.save()
        delete(bundle)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_delete_after_everything_is_gone(bundle: Path) -> None:
    files = sandbox(bundle)
    with subprocess.Popen(["sleep", "60"]) as process:
        files.vmm = files.shim = identify(process.pid)
        files.save()
        process.kill()
    files.remove()
    assert delete(bundle)[0].exit_status == 137


def test_delete_with_a_damaged_state_file_says_so(bundle: Path) -> None:
    files = sandbox(bundle)
    (Path(files.directory) / "state.json").write_text('{"shim": ')
    words = ("-namespace", "default", "-id", "c1", "-bundle", str(bundle), "delete")
    done = run(bundle, *words)
    assert done.returncode == 1
    assert b"damaged" in done.stderr


def test_logs_are_kept_where_the_configuration_says(bundle: Path) -> None:
    files = sandbox(bundle)
    files.log_dir = str(bundle / "logs")
    files.save()
    Path(files.console_log).write_text("last words")
    delete(bundle)
    assert (bundle / "logs/default-c1.console.log").read_text() == "last words"
