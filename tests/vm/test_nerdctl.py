"""nerdctl with real guests: what `nerdctl` users type, on the containerd 2.x of the vm lane."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cri.client import wait_for
from dev_vm import RUNTIME, SMALL, DevVm, Result
from second_containerd import SecondContainerd

pytestmark = [pytest.mark.vm]


class Nerdctl:
    def __init__(self, second: SecondContainerd) -> None:
        self._second = second

    def call(self, *words: str, stdin: bytes = b"") -> Result:
        return self._second.dev_vm.run(*self._second.nerdctl_words, *words, stdin=stdin)

    def check(self, *words: str, stdin: bytes = b"") -> str:
        done = self.call(*words, stdin=stdin)
        assert done.code == 0, f"nerdctl {' '.join(words)}: {done.error_text}"
        return done.text

    def run(self, *words: str) -> str:
        return self.check("run", "--runtime", RUNTIME, "--pull", "never", *words)


@pytest.fixture(scope="module")
def nerdctl(second: SecondContainerd) -> Nerdctl:
    return Nerdctl(second)


@pytest.fixture(scope="module")
def web(nerdctl: Nerdctl) -> Iterator[str]:
    """A container with a published port, for all tests that leave it as it is."""
    script = (
        "mkdir /tmp/www; echo served >/tmp/www/index.html; echo started; echo warned >&2; "
        "exec httpd -f -p 8080 -h /tmp/www"
    )
    flags = ("-d", "--name", "web", "--memory", "128m", "--cpus", "1", "-p", "127.0.0.1:8088:8080")
    nerdctl.run(*flags, SMALL, "sh", "-c", script)
    yield "web"
    nerdctl.check("rm", "-f", "web")


def test_run_and_exit_status(nerdctl: Nerdctl) -> None:
    done = nerdctl.call(
        "run", "--rm", "-i", "--runtime", RUNTIME, "--net", "none", "--pull", "never", SMALL,
        "sh", "-c", "uname -r; cat; echo err >&2; exit 7", stdin=b"typed\n",
    )  # fmt: skip
    assert done.code == 7, done.error_text
    release, *rest = done.text.splitlines()
    assert release.startswith("6.12")
    assert rest == ["typed"]
    assert "err" in done.error_text


def test_published_port(nerdctl: Nerdctl, web: str, dev_vm: DevVm) -> None:
    shown = nerdctl.check("port", web)
    assert shown.strip() == "8080/tcp -> 127.0.0.1:8088"
    script = "until busybox wget -q -O - http://127.0.0.1:8088/; do sleep 0.2; done"
    assert dev_vm.check("timeout", "30", "sh", "-c", script) == "served\n"


def test_exec(nerdctl: Nerdctl, web: str) -> None:
    done = nerdctl.call("exec", "-i", web, "sh", "-c", "cat; exit 5", stdin=b"in")
    assert (done.code, done.stdout) == (1, b"in")
    assert "exec failed with exit code 5" in done.error_text


def test_logs(nerdctl: Nerdctl, web: str) -> None:
    done = nerdctl.call("logs", web)
    assert "started" in done.text
    assert "warned" in done.error_text


def test_stats_and_inspect(nerdctl: Nerdctl, web: str) -> None:
    row = json.loads(nerdctl.check("stats", "--no-stream", "--format", "json", web))
    assert row["Name"] == "web"
    assert row["MemUsage"].endswith(" / 128MiB")
    (shown,) = json.loads(nerdctl.check("inspect", web))
    assert shown["State"]["Status"] == "running"


def test_pause_and_update(nerdctl: Nerdctl, web: str) -> None:
    nerdctl.check("pause", web)
    (shown,) = json.loads(nerdctl.check("inspect", web))
    assert shown["State"]["Status"] == "paused"
    nerdctl.check("unpause", web)
    nerdctl.check("update", "--memory", "64m", web)
    assert nerdctl.check("exec", web, "cat", "/sys/fs/cgroup/memory.max") == f"{64 << 20}\n"
    refused = nerdctl.call("update", "--memory", "8g", web)
    assert refused.code != 0
    assert "gets no more" in refused.error_text


def test_stop(nerdctl: Nerdctl) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.2; done"
    nerdctl.run("-d", "--name", "graceful", "--net", "none", SMALL, "sh", "-c", script)
    try:
        wait_for(lambda: nerdctl.check("logs", "graceful"), lambda text: "ready" in text, 60)
        nerdctl.check("stop", "-t", "60", "graceful")
        (shown,) = json.loads(nerdctl.check("inspect", "graceful"))
        assert shown["State"]["ExitCode"] == 4
        assert nerdctl.check("logs", "graceful") == "ready\nbye\n"
    finally:
        nerdctl.check("rm", "-f", "graceful")
