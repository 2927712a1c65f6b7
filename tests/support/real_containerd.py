"""A containerd of the test's own in a temporary folder, and images for it without a registry."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class RealContainerd:
    """`socket` is the gRPC socket's path."""

    folder: Path
    socket: str
    log: Path

    def ctr(self, *words: str, namespace: str = "vmcell") -> str:
        """Standard output of `ctr`; raises CalledProcessError with its words."""
        command = ["ctr", "-a", self.socket, "-n", namespace, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}\n{self.tail()}")
        return done.stdout

    def tail(self) -> str:
        """The last lines of the daemon's log."""
        return "\n".join(self.log.read_text().splitlines()[-15:])

    def traces(self) -> dict[str, list[str]]:
        """What there is of containers, tasks, active snapshots and leases."""
        snapshots = self.ctr("snapshots", "list").splitlines()[1:]
        return {
            "containers": self.ctr("containers", "list", "-q").split(),
            "tasks": self.ctr("tasks", "list", "-q").split(),
            "snapshots": [line for line in snapshots if line.split()[-1] == "Active"],
            "leases": self.ctr("leases", "list", "-q").split(),
        }


@contextlib.contextmanager
def real_containerd(folder: Path) -> Iterator[RealContainerd]:
    """Starts containerd with state and root in `folder` and ends it with all its shims."""
    folder.mkdir(exist_ok=True)
    # Short, because shim and ttrpc sockets are unix sockets.
    state = folder / "s"
    config = folder / "config.toml"
    socket = folder / "c.sock"
    config.write_text(
        f'version = 2\nroot = "{folder / "r"}"\nstate = "{state}"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs",'
        '"io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",'
        '"io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp",'
        '"io.containerd.internal.v1.tracing", "io.containerd.internal.v1.opt"]\n'
        f'[grpc]\naddress = "{socket}"\n[ttrpc]\naddress = "{socket}.ttrpc"\n'
    )
    log = folder / "containerd.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(["containerd", "-c", str(config)], stderr=output, stdout=output)
    running = RealContainerd(folder=folder, socket=str(socket), log=log)
    try:
        _wait_until_it_answers(daemon, running)
        yield running
    finally:
        daemon.terminate()
        daemon.wait(20)
        _end_shims(str(socket))
        _unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(daemon: subprocess.Popen[bytes], running: RealContainerd) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    command = ["ctr", "-a", running.socket, "--connect-timeout", "1s", "version"]
    while subprocess.run(command, capture_output=True, timeout=20, check=False).returncode:
        assert daemon.poll() is None, running.tail()
        assert time.monotonic() < deadline, running.tail()
        time.sleep(0.05)


def _end_shims(socket: str) -> None:
    """Kills the shims that this daemon started: they carry its socket in their arguments."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"containerd-shim-runc-v2") and socket.encode() in words:
                os.kill(int(entry.name), signal.SIGKILL)


def _unmount_below(folder: Path) -> None:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = [line.split()[4] for line in lines if line.split()[4].startswith(f"{folder}/")]
    for target in reversed(targets):
        subprocess.run(["umount", "-l", target], check=False, timeout=20)


def write_image(
    path: Path,
    name: str,
    files: dict[str, tuple[bytes, int]],
    *,
    layer: bytes = b"",
    labels: dict[str, str] | None = None,
) -> None:
    """Writes an OCI image archive with one layer: the tar `layer`, or one of `files`, which maps
    paths to (content, mode)."""
    layer = layer or _tar({name: entry for name, entry in files.items()})
    layer_digest = _digest(layer)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": ["PATH=/bin", "FROM_IMAGE=yes"],
                "WorkingDir": "/",
                "Labels": labels or {},
            },
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        }
    ).encode()
    kinds = "application/vnd.oci.image."
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{kinds}manifest.v1+json",
            "config": _descriptor(f"{kinds}config.v1+json", config),
            "layers": [_descriptor(f"{kinds}layer.v1.tar", layer)],
        }
    ).encode()
    entry = _descriptor(f"{kinds}manifest.v1+json", manifest)
    entry["annotations"] = {"io.containerd.image.name": name}
    entry["platform"] = {"os": "linux", "architecture": "amd64"}
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs = {f"blobs/sha256/{_digest(b)[7:]}": (b, 0o644) for b in (layer, config, manifest)}
    layout = {"oci-layout": (b'{"imageLayoutVersion": "1.0.0"}', 0o644)}
    path.write_bytes(_tar({**layout, "index.json": (index, 0o644), **blobs}))


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}
