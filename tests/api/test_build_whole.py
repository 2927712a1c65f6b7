"""A build from first to last without a machine: real containerd, real agent, real envd.

Only the hypervisor and the network are missing: the build's sandbox is a container that a real
agent makes on this host, from an EROFS image of what containerd has unpacked.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import make_busybox_tree, make_erofs, running_agent
from builder_guest import builder_guest
from real_containerd import RealContainerd, real_containerd, write_image

from vmcell_api.node.build_images import BuildImages
from vmcell_api.node.build_records import BuildRecord
from vmcell_api.node.build_run import BuildRequest, BuildRun, Outcome, StepFailed
from vmcell_api.node.build_steps import Step
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.guest_process import GuestProcesses
from vmcell_api.node.upload_files import open_upload

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
IMAGE = "docker.io/test/busybox:1"
TEAM = str(uuid.uuid4())
HASH = "ab" * 32


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealContainerd]:
    with real_containerd(Path(tempfile.mkdtemp(prefix="vmc"))) as running:
        tree = running.folder / "tree"
        make_busybox_tree(tree)
        (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (tree / "home/user").rmdir()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(tree, arcname=".")
        write_image(running.folder / "image.tar", IMAGE, {}, layer=buffer.getvalue())
        running.ctr("images", "import", "--no-unpack", str(running.folder / "image.tar"))
        yield running


class HostMachines:
    """Boots the builder from an image as the shim would: one EROFS of all its layers."""

    def __init__(self, daemon: RealContainerd, folder: Path) -> None:
        self._daemon = daemon
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.boots: list[str] = []

    def boot(self, request: BuildRequest, image: str) -> GuestProcesses:
        self.boots.append(image)
        tree = self._folder / f"mount{len(self.boots)}"
        tree.mkdir(parents=True)
        self._daemon.ctr("images", "mount", image, str(tree))
        try:
            erofs = make_erofs(tree, self._folder / f"{uuid.uuid4()}.erofs")
        finally:
            self._daemon.ctr("images", "unmount", "--rm", str(tree))
        agent = self._stack.enter_context(running_agent())
        agent.attach_lower(erofs)
        agent.attach_upper()
        return self._stack.enter_context(builder_guest(agent)).processes

    def end(self) -> None:
        self._stack.close()


class Bench:
    def __init__(self, daemon: RealContainerd, folder: Path) -> None:
        self._daemon = daemon
        self.folder = folder
        containerd = Containerd(daemon.socket, namespace="vmcell", snapshotter="overlayfs")
        containerd.ensure_namespace()
        self.close = containerd.close
        self.images = BuildImages(containerd, daemon.socket, cache_limit=100)
        self.record = BuildRecord(folder)
        self.boots: list[str] = []

    def build(self, *steps: Step, **changes: object) -> Outcome:
        request = BuildRequest(
            build_id=str(uuid.uuid4()),
            team_id=TEAM,
            template_id="t" * 20,
            from_image=IMAGE,
            steps=steps,
            **changes,  # type: ignore[arg-type]  # test values
        )
        self.record = BuildRecord(self.folder / "builds" / request.build_id)
        self.record.create("x")
        machines = HostMachines(self._daemon, self.folder / request.build_id)
        self.boots = machines.boots
        run = BuildRun(
            request=request,
            record=self.record,
            images=self.images,
            machines=machines,
            open_upload=lambda team, files: open_upload(
                str(self.folder / "uploads"), team, files, owner_uid=os.geteuid()
            ),
            deadline=time.monotonic() + 200,
            layer_limit_bytes=64 << 20,
        )
        return run.run()

    def log(self) -> list[str]:
        return [entry.message for entry in self.record.entries(0, 1000)]

    def run(self, image: str, script: str) -> list[str]:
        """Output of a script in a container of the image, by runc."""
        words = ("run", "--rm", "--net-host", image, f"t{uuid.uuid4().hex[:8]}", "/bin/sh", "-c")
        return self._daemon.ctr(*words, script).splitlines()


@pytest.fixture
def bench(daemon: RealContainerd, tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(daemon, tmp_path)
    uploads = tmp_path / "uploads" / TEAM
    uploads.mkdir(parents=True)
    with tarfile.open(uploads / HASH, "w:gz") as tar:
        for name in ("app/one.txt", "app/sub/two.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(name) + 1
            tar.addfile(info, io.BytesIO(f"{name}\n".encode()))
    yield opened
    opened.close()
    assert daemon.ctr("leases", "list", "-q").split() == []
    assert not [row for row in daemon.traces()["snapshots"] if "Active" in row]


def _run(command: str, user: str = "") -> Step:
    return Step(type="RUN", args=(command, user) if user else (command,))


STEPS = (
    Step(type="COPY", args=("app", "/srv/app", "", "0750"), files_hash=HASH),
    Step(type="ENV", args=("COLOUR", "red", "PATH", "/srv/bin:$PATH")),
    Step(type="WORKDIR", args=("/srv/app",)),
    _run("cat one.txt; id -un; pwd; echo $COLOUR > made"),
    _run("rm -r /var/lib; echo root > /etc/owned", "root"),
)


def test_the_whole_of_a_build(bench: Bench) -> None:
    outcome = bench.build(
        *STEPS, start_command="touch /tmp/up; sleep 100", ready_command="test -f /tmp/up"
    )
    assert (outcome.default_user, outcome.default_workdir) == ("user", "/srv/app")
    log = bench.log()
    assert {"app/one.txt", "user", "/srv/app"} <= set(log)
    script = (
        "cat made sub/two.txt; echo $PATH; stat -c %a:%U one.txt; stat -c %a sub; "
        "[ -e /var/lib ] || echo gone; cat /etc/owned; id -u user; ls /tmp"
    )
    assert bench.run(outcome.image, script) == [
        "red",
        "app/sub/two.txt",
        "/srv/bin:/bin",
        "750:user",
        "750",
        "gone",
        "root",
        "1000",
    ], "and nothing that the start command wrote"

    again = bench.build(
        *STEPS, start_command="touch /tmp/up; sleep 100", ready_command="test -f /tmp/up"
    )
    assert bench.boots == []
    assert bench.run(again.image, "cat made") == ["red"]

    with pytest.raises(StepFailed, match="the reason") as caught:
        bench.build(*STEPS, _run("echo the reason >&2; exit 7"))
    assert (caught.value.step, len(bench.boots)) == ("6", 1)
    with pytest.raises(StepFailed, match="invalid username: 'root123'"):
        bench.build(*STEPS, _run("whoami", "root123"))

    more = bench.build(
        *STEPS[:4], _run("mv made /srv/moved && mkdir -p sub/new && ln sub/two.txt sub/l", "root")
    )
    assert bench.boots[0].startswith("vmcell.local/cache/")
    assert bench.run(more.image, "cat /srv/moved; ls sub; [ -e made ] || echo gone; ls /var") == [
        *("red", "l", "new", "two.txt", "gone", "lib"),
    ]


def test_files_that_are_not_in_the_upload_fail_by_name(bench: Bench) -> None:
    wrong = Step(type="COPY", args=("nosuch", "/srv"), files_hash=HASH)
    with pytest.raises(StepFailed, match="nosuch: not in the upload"):
        bench.build(wrong)
    missing = Step(type="COPY", args=("app", "/srv"), files_hash="cd" * 32)
    with pytest.raises(StepFailed, match="were not uploaded"):
        bench.build(missing)


def test_a_step_that_writes_too_much_is_named(bench: Bench) -> None:
    with pytest.raises(StepFailed, match="more than 64 MiB"):
        bench.build(_run("dd if=/dev/zero of=/home/big bs=1M count=70", "root"))


def test_cancelling_a_real_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    whole = BuildRecord.log

    def log(self: BuildRecord, level: str, message: str, step: str) -> None:
        whole(self, level, message, step)
        if message == "running":
            started.set()

    monkeypatch.setattr(BuildRecord, "log", log)
    runs: list[BuildRun] = []
    start = BuildRun.run

    def run(self: BuildRun) -> Outcome:
        runs.append(self)
        return start(self)

    monkeypatch.setattr(BuildRun, "run", run)

    def cancel() -> None:
        assert started.wait(60)
        runs[0].cancelled.set()
        runs[0].machines.end()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(StepFailed, match="cancelled"):
        bench.build(_run("echo running; sleep 1000"))
    thread.join(60)
    assert subprocess.run(["pgrep", "-f", "sleep 1000$"], check=False).returncode == 1
