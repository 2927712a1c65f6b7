"""The words of `vmcell`: help is quick, every error is one sentence, JSON is JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmcell_shim.config import ShimConfig, render_config
from vmcell_tools import dev_run, dev_ssh, setup_host
from vmcell_tools.cli import main

HEAVY = ("rich", "grpc", "subprocess", "vmcell_tools.dev_vm", "vmcell_tools.oci_image")


@pytest.fixture(autouse=True)
def _nothing_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VMCELL_DEV_NAME", raising=False)
    # Sockets stand in this one, and tmp_path may be too long for them.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="vmcell-") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        yield


def vmcell(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, words)
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_command_and_imports_none_of_their_work() -> None:
    script = (
        "import sys\nfrom vmcell_tools.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    shown = subprocess.check_output([sys.executable, "-c", script], text=True)
    *help_lines, imported = shown.splitlines()
    assert imported == "[]"
    words = (
        "dev",
        "setup",
        "doctor",
        "kernel",
        "image",
        "template",
        "sandbox",
        "snapshot",
        "volume",
        "cache",
        "team",
        "key",
        "audit",
        "migrate",
        "bench",
        "demo",
        "serve",
        "zygote",
    )
    for word in words:
        assert any(line.split()[:1] == [word] for line in help_lines), word


def test_zygote_becomes_the_installed_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(setup_host, "SHIM_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(os, "execv", lambda path, words: executed.append((path, words)))
    code, _, error = vmcell("zygote")
    assert (code, executed) == (1, [])
    assert error.endswith("is missing; run: vmcell setup\n")
    shim = tmp_path / setup_host.SHIM_NAME
    shim.touch(0o755)
    assert vmcell("zygote")[0] == 0
    assert executed == [(str(shim), [str(shim), "zygote"])]


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "vmcell_tools", "dev", "status", "--name", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: dev VM 'nope' is not up; run: vmcell dev up --name nope\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dev", "status"), "run: vmcell dev up\n"),
        (("dev", "run", "--", "true"), "run: vmcell dev up\n"),
        (("dev", "run"), "needs a command"),
        (("dev", "down", "--name", "A/B"), "dev VM name 'A/B'"),
        (("dev", "up", "--memory-mib", "1"), "memory of 1 MiB"),
        (("dev", "up", "--accel", "warp"), "accelerator 'warp'"),
        (("dev", "up", "--store", "../x"), "store key '../x'"),
        (("dev", "up", "--image", "small"), "--store KEY"),
        (("image", "build", "games"), "no image 'games'"),
        (("image", "import", "games"), "no image 'games'"),
    ],
)
def test_bad_requests_are_one_sentence(
    words: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code, out, error = vmcell(*words)
    assert (code, out) == (1, "")
    assert sentence in error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.sock"))


def test_the_dev_vm_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, _, error = vmcell("dev", "up")
    assert code == 1
    assert "needs root" in error


def test_wrong_usage_is_status_two() -> None:
    assert vmcell("dev", "up", "--cpus", "many")[0] == 2
    assert vmcell("games")[0] == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dev", "up", "--lifetime", "-1"), "-1 is not in the range x>=60"),
        (("dev", "up", "--deadline", "0"), "0.0 is not in the range x>=1"),
        (("dev", "run", "-e", "COLOUR", "--", "true"), "'COLOUR' is not NAME=VALUE"),
        (("dev", "run", "-e", "=red", "--", "true"), "'=red' is not NAME=VALUE"),
    ],
)
def test_wrong_values_are_named(words: tuple[str, ...], sentence: str) -> None:
    code, out, error = vmcell(*words)
    assert (code, out) == (2, "")
    assert sentence in error


def test_another_users_dev_vm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(os.environ["XDG_RUNTIME_DIR"], "file")
    place.touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    code, _, error = vmcell("dev", "down")
    assert code == 1
    assert "cannot use the dev VM's directory" in error
    assert "set XDG_RUNTIME_DIR" in error


def test_down_without_a_vm_is_fine() -> None:
    assert vmcell("dev", "down") == (0, "dev VM 'default' was not up\n", "")


def test_doctor_prints_all_rows_as_json() -> None:
    code, out, _ = vmcell("doctor", "--json")
    rows = json.loads(out)
    assert {"what", "found", "status", "advice"} == set(rows[0])
    assert code == any(row["status"] == "fail" for row in rows)
    _, table, _ = vmcell("doctor")
    assert all(row["what"] in table for row in rows)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one file in it, which is no image."""
    config = ShimConfig(kernel="/k", base_image="/b", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "config.toml").write_text(render_config(config))
    monkeypatch.setenv("VMCELL_CONFIG", str(tmp_path / "config.toml"))
    path = tmp_path / "cache/erofs/0123456789abcdef.erofs"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(8192))
    return path


def test_the_cache_is_listed_and_pruned(image: Path) -> None:
    code, out, _ = vmcell("cache", "list", "--json")
    (row,) = json.loads(out)
    assert (code, row["path"], row["state"]) == (0, str(image), "damaged")
    assert row["size_bytes"] == 8192
    _, table, _ = vmcell("cache", "list")
    assert "0123456789ab" in table
    assert "damaged" in table
    assert vmcell("cache", "prune")[1].endswith("removed 1 images, 0 MiB\n")
    assert not image.exists()
    assert json.loads(vmcell("cache", "prune", "--json")[1]) == []


def test_a_cache_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMCELL_CONFIG", str(tmp_path / "absent.toml"))
    code, out, error = vmcell("cache", "list")
    assert (code, out) == (1, "")
    path = tmp_path / "absent.toml"
    assert error == (
        f"Error: cannot read {path}: No such file or directory; run `vmcell setup` to write it\n"
    )
    assert vmcell("cache", "prune", "--limit-mib", "-1")[0] == 2


@pytest.mark.parametrize(("word", "verb"), [("list", "read"), ("prune", "clean")])
def test_a_cache_that_cannot_be_used(image: Path, word: str, verb: str) -> None:
    folder = image.parent
    image.unlink()
    folder.rmdir()
    folder.touch()
    code, _, error = vmcell("cache", word)
    assert code == 1
    assert f"cannot {verb} the image cache {folder}: Not a directory; run it as root" in error


def test_a_containerd_that_is_not_there(tmp_path: Path) -> None:
    code, _, error = vmcell("bench", "exec", "-n", "1", "--address", str(tmp_path / "none.sock"))
    assert code == 1
    assert error.startswith(
        "Error: looking up image docker.io/vmcell/small:latest: containerd does"
    )
    assert error.endswith("; see: vmcell doctor\n")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = vmcell("dev", "up", "--name", "t", "--api-port", str(port))
    assert code == 1
    assert f"port {port} of 127.0.0.1 is in use" in error


def test_the_remote_line_keeps_words_directory_and_variables_whole(tmp_path: Path) -> None:
    """The line for the VM's shell, given to this host's."""
    command = dev_run.Command(
        words=("printf", "%s|", "a b", "it's", "$HOME", ""),
        directory=str(tmp_path),
        environment={"COLOUR": "deep red"},
    )
    line = dev_run.remote_line(command, token="t", terminal=True)
    line = line.replace(dev_run.PID_DIRECTORY, str(tmp_path))
    line += "; pwd; echo $COLOUR"
    shown = subprocess.check_output(["sh", "-c", line], text=True)
    assert shown == f"a b|it's|$HOME||{tmp_path}\ndeep red\n"
    assert not list(tmp_path.glob("run-*"))


def test_the_remote_line_passes_the_exit_status(tmp_path: Path) -> None:
    command = dev_run.Command(words=("sh", "-c", "exit 7"), directory="/")
    line = dev_run.remote_line(command, token="t", terminal=False)
    line = line.replace(dev_run.PID_DIRECTORY, str(tmp_path))
    assert subprocess.run(["sh", "-c", line], check=False).returncode == 7


def test_ssh_ignores_the_users_configuration_and_checks_the_key(tmp_path: Path) -> None:
    command = dev_ssh.ssh_command(tmp_path, 4022, "-T")
    assert command[:3] == ["ssh", "-F", "none"]
    assert "StrictHostKeyChecking=yes" in command
    assert f"UserKnownHostsFile={tmp_path}/known_hosts" in command
    assert command[-1] == "root@127.0.0.1"
