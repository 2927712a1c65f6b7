"""A containerd of one's own: private directories, private socket, a shim with a fake guest.

Nothing of the machine's containerd is touched, except that shims' sockets stand in
/run/containerd/s, where containerd puts them whatever its configuration says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

from containerd_configs import configuration
from containerd_release import DEBIAN, Release, find_release
from shim_harness import wait_until, write_settings
from zygote_harness import Zygote

from vmcell_tools import dev_containerd

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = [str(ROOT / name) for name in ("protos", "runtime", "shim")]
RUNTIME = "io.containerd.vmcell.v2"
IMAGE = "docker.io/vmcell-test/layers:latest"

_STUB = """#!{python} -ISB
import sys
sys.path[:0] = {roots!r}
{patch}
from vmcell_shim.bootstrap import main
sys.exit(main(sys.argv))
"""
_PATCH = "import fake_vmm; from vmcell_runtime import handle; handle.spawn = fake_vmm.spawn"
# Pods always have a daemon for live directories.
_PATCH_PODS = f"{_PATCH}; from vmcell_shim import sandbox; from fake_share import FakeShare; "
_PATCH_PODS += "sandbox.Share = FakeShare"


class PrivateContainerd:
    """One daemon below `directory`; start() again after kill() for a restart.

    `release`: Debian's unless given. `cri`: with pods; the daemon then has a network namespace of
    its own, where their veth pairs end. With `zygote`, shims are forked by one of its own, which
    has the fake guest too. `patch` is run by the shim's binary before all else.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fake_guest: bool,
        cri: bool = False,
        zygote: bool = False,
        release: Release | None = None,
        patch: str = "",
    ) -> None:
        self.directory = directory
        self.release = release or find_release(DEBIAN)
        config = str(directory / "containerd.toml")
        self.command = [self.release.program("containerd"), "--config", config]
        self.socket = directory / "containerd.sock"
        self.log = directory / "containerd.log"
        self._popen: subprocess.Popen[bytes] | None = None
        (directory / "bin").mkdir()
        shim = directory / "bin/containerd-shim-vmcell-v2"
        roots = [*SOURCE_ROOTS, str(ROOT / "tests/support")]
        patches = [(_PATCH_PODS if cri else _PATCH) if fake_guest else "", patch]
        text = "\n".join(filter(None, patches))
        shim.write_text(_STUB.format(python=sys.executable, roots=roots, patch=text))
        shim.chmod(0o755)
        self.zygote = Zygote(f"{directory}/z", shim) if zygote else None
        if cri:
            self.command = ["unshare", "--net", *self.command]
            (directory / "cni").mkdir()
            for path, content in dev_containerd.files().items():
                if path.endswith(".conflist"):
                    (directory / "cni" / Path(path).name).write_bytes(content)
        text = configuration(directory, version=self.release.config, cri=cri, image=IMAGE)
        (directory / "containerd.toml").write_text(text)
        write_settings(directory / "vmcell.toml")

    def environment(self) -> dict[str, str]:
        """What the daemon has beside what this process has."""
        return {
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
            "VMCELL_CONFIG": str(self.directory / "vmcell.toml"),
            "FAKE_RECORD": str(self.directory / "record.json"),
            "VMCELL_ZYGOTE": self.zygote.path if self.zygote else "",
        }

    def start(self) -> None:
        if self._popen is not None:
            # Whoever has killed it.
            self._popen.wait(10)
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: self.ctr("version").returncode == 0, "containerd", 30)

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.send_signal(signal.SIGKILL)
            self._popen.wait(10)

    def ctr(
        self, *words: str, stdin: bytes = b"", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        command = [self.release.program("ctr"), "--address", str(self.socket), *words]
        return subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout_s, check=False
        )

    def run(
        self, name: str, *words: str, flags: tuple[str, ...] = (), stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """`ctr run` of a program of the host (the fake guest runs it here)."""
        return self.ctr("run", *flags, "--runtime", RUNTIME, IMAGE, name, *words, stdin=stdin)

    def import_image(self, namespace: str = "default") -> None:
        """An image of two layers, the upper of which deletes and replaces."""
        path = self.directory / "image.tar"
        path.write_bytes(image_archive(IMAGE, [LOWER_LAYER, UPPER_LAYER]))
        done = self.ctr("-n", namespace, "image", "import", str(path))
        assert done.returncode == 0, done.stderr

    def status(self, name: str) -> str:
        """What `ctr task list` says of one task, "" when it is not there."""
        for line in self.ctr("task", "list").stdout.decode().splitlines():
            columns = line.split()
            if columns and columns[0] == name:
                return columns[2]
        return ""

    def pid(self, name: str) -> int:
        for line in self.ctr("task", "list").stdout.decode().splitlines():
            columns = line.split()
            if columns and columns[0] == name:
                return int(columns[1])
        raise LookupError(name)

    def leftovers(self) -> list[str]:
        """Bundles, state, sandbox files and processes that are still there, the zygote not."""
        found = [str(path) for path in self.directory.glob("run/*/*")]
        found += [str(path) for path in self.directory.glob("cache/sandboxes/*/*")]
        found += [str(path) for path in self.directory.glob("state/*.task/*/*")]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if self.is_shim(line):
                    found.append(line.replace(b"\0", b" ").decode())
        return found

    def is_shim(self, command_line: bytes) -> bool:
        """Whether a process is a shim of this containerd, by /proc/PID/cmdline."""
        words = command_line.split(b"\0")
        return f"{self.directory}/bin/containerd-shim-vmcell-v2".encode() in words and (
            b"zygote" not in words
        )


Layer = dict[str, bytes | str | None]
# name → content, a link's target, or None for a directory.
LOWER_LAYER: Layer = {
    "bin": None,
    "etc": None,
    "etc/kept": b"from below",
    "etc/replaced": b"from below",
    "etc/deleted": b"from below",
    "gone": None,
    "gone/file": b"from below",
    "bin/link": "../etc/kept",
}
UPPER_LAYER: Layer = {
    "etc": None,
    "etc/replaced": b"from above",
    "etc/.wh.deleted": b"",
    "gone": None,
    "gone/.wh..wh..opq": b"",
    "gone/new": b"from above",
}


def layer_tar(layer: Layer) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in layer.items():
            entry = tarfile.TarInfo(name)
            entry.mtime = 1_600_000_000
            entry.mode = 0o755
            if content is None:
                entry.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
            else:
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def image_archive(name: str, layers: list[Layer]) -> bytes:
    """An OCI layout in a tar, as `ctr image import` takes it (image-spec 1.0)."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"digest": f"sha256:{digest}", "size": len(data), "mediaType": media_type}

    prefix = "application/vnd.oci.image"
    rows = [put(layer_tar(layer), f"{prefix}.layer.v1.tar") for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [row["digest"] for row in rows]},
    }
    manifest = {
        "schemaVersion": 2,
        "config": put(json.dumps(config).encode(), f"{prefix}.config.v1+json"),
        "layers": rows,
    }
    row = put(json.dumps(manifest).encode(), f"{prefix}.manifest.v1+json")
    row["annotations"] = {"io.containerd.image.name": name}
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [row]}).encode(),
        **blobs,
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
