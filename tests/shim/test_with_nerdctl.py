"""nerdctl drives the real shim under a containerd 2.x; only the guest is a fake."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_release import NEWER, find_nerdctl, find_release
from private_containerd import IMAGE, RUNTIME, PrivateContainerd
from shim_harness import wait_until

pytestmark = pytest.mark.root


class Nerdctl:
    """nerdctl with data and networks of its own, at a private containerd."""

    def __init__(self, containerd: PrivateContainerd, program: Path) -> None:
        home = containerd.directory / "nerdctl"
        self.containerd = containerd
        self._words = (
            str(program),
            *("--address", str(containerd.socket), "--namespace", "default"),
            *("--data-root", str(home), "--cni-netconfpath", str(home / "cni")),
            *("--cni-path", "/usr/lib/cni"),
        )

    def call(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self._words, *words], input=stdin, capture_output=True, timeout=60, check=False
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def check(self, *words: str, stdin: bytes = b"") -> str:
        done = self.call(*words, stdin=stdin)
        assert done.returncode == 0, f"nerdctl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def run(self, *words: str) -> str:
        return self.check(
            "run", "--runtime", RUNTIME, "--pull", "never", "--net", "none", *words
        ).strip()

    def state(self, name: str) -> dict[str, object]:
        (shown,) = json.loads(self.check("inspect", name))
        state = shown["State"]
        assert isinstance(state, dict)
        return state


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nerdctl]:
    program = find_nerdctl()
    directory = tmp_path_factory.mktemp("ner")
    containerd = PrivateContainerd(directory, fake_guest=True, release=find_release(NEWER))
    containerd.start()
    try:
        containerd.import_image()
        yield Nerdctl(containerd, program)
    finally:
        containerd.kill()


@pytest.fixture
def nerdctl(daemon: Nerdctl) -> Iterator[Nerdctl]:
    """Checked afterwards: nothing is left of what the test ran as c1."""
    yield daemon
    daemon.call("rm", "-f", "c1")
    leftovers = daemon.containerd.leftovers
    wait_until(lambda: leftovers() == [], f"an end of {leftovers()}")


def test_run_and_exit_status(nerdctl: Nerdctl) -> None:
    done = nerdctl.call(
        "run", "--rm", "-i", "--name", "c1", "--runtime", RUNTIME, "--pull", "never",
        "--net", "none", IMAGE, "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"typed\n",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "typed\n"), done.stderr
    assert done.stderr.splitlines()[-1] == "err"


def test_exec_and_logs(nerdctl: Nerdctl) -> None:
    """Its logs come through `binary://`: a program that the shim starts."""
    script = "echo started; echo warned >&2; exec sleep 600"
    nerdctl.run("-d", "--name", "c1", IMAGE, "sh", "-c", script)
    done = nerdctl.call("exec", "-i", "c1", "sh", "-c", "cat; exit 5", stdin=b"in")
    # Its own status is 1, whatever the runtime.
    assert (done.returncode, done.stdout) == (1, "in")
    assert "exec failed with exit code 5" in done.stderr
    logs = nerdctl.call("logs", "c1")
    assert (logs.stdout, logs.stderr) == ("started\n", "warned\n")
    nerdctl.check("kill", "c1")
    assert nerdctl.check("wait", "c1").strip() == "137"
    # The same container again: no state of the first task may be left.
    nerdctl.check("start", "c1")
    assert nerdctl.state("c1")["Status"] == "running"


def test_pause_update_and_stats(nerdctl: Nerdctl) -> None:
    nerdctl.run("-d", "--name", "c1", "--memory", "128m", "--cpus", "1", IMAGE, "sleep", "600")
    nerdctl.check("pause", "c1")
    assert nerdctl.state("c1")["Status"] == "paused"
    nerdctl.check("unpause", "c1")
    nerdctl.check("update", "--memory", "64m", "c1")
    refused = nerdctl.call("update", "--memory", "8g", "c1")
    assert refused.returncode != 0
    assert "gets no more" in refused.stderr
    row = json.loads(nerdctl.check("stats", "--no-stream", "--format", "json", "c1"))
    assert row["Name"] == "c1"
    assert row["MemUsage"].startswith("56KiB / ")  # without what its files take
    assert "c1" in nerdctl.check("ps", "--format", "{{.Names}}")


def test_stop_is_a_signal_first(nerdctl: Nerdctl) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.05; done"
    nerdctl.run("-d", "--name", "c1", IMAGE, "sh", "-c", script)
    wait_until(lambda: "ready" in nerdctl.call("logs", "c1").stdout, "the trap")
    nerdctl.check("stop", "-t", "20", "c1")
    assert nerdctl.state("c1")["ExitCode"] == 4
    assert nerdctl.check("logs", "c1") == "ready\nbye\n"


def test_the_hosts_network_is_refused(nerdctl: Nerdctl) -> None:
    done = nerdctl.call(
        "run", "--rm", "--name", "c1", "--runtime", RUNTIME, "--pull", "never", "--net", "host",
        IMAGE, "true",
    )  # fmt: skip
    assert done.returncode != 0
    assert "a microVM has a network of its own" in done.stderr
