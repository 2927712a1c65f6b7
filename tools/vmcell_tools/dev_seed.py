"""Images in a store's containerd before a dev VM has it: this host unpacks them, which takes the
software CPU twenty times as long.

A containerd of our own runs here meanwhile, its root on the store. Nothing depends on it: where it
does not work a line says why, and whoever needs an image imports it in the VM.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.build_step import run_step
from vmcell_tools.dev_store import Store
from vmcell_tools.image_import import archive_digest, import_archive
from vmcell_tools.oci_image import find_oci_image
from vmcell_tools.progress import Progress

NAMESPACE = "vmcell"
# Where dev_guest/init.sh looks for containerd's root on a store.
ROOT_ON_STORE = "containerd"
MOUNT_DEADLINE_S = 60
START_WITHIN_S = 30.0
END_WITHIN_S = 30.0
CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
"""


def seed(store: Store, names: Sequence[str], cache: BuildCache, progress: Progress) -> list[str]:
    """The names of those images that the store had not; it is no VM's and not mounted afterwards.

    What it has is remembered beside it. Raises HostError for an image that is not built, and for a
    store that stays mounted.
    """
    images = {}
    for name in names:
        image = find_oci_image(name, cache, progress)
        if image is None:
            raise HostError(f"image {name!r} is not built; run: vmcell image build {name}")
        images[name] = image
    wanted = {name: archive_digest(image.archive) for name, image in images.items()}
    had = _remembered(store)
    if wanted.items() <= had.items():
        return []
    done = []
    with tempfile.TemporaryDirectory(prefix="vmcell-seed-") as folder, _mounted(store) as mount:
        try:
            with _containerd(Path(folder), mount / ROOT_ON_STORE) as socket:
                for name, image in images.items():
                    if import_archive(image, (NAMESPACE,), progress, socket):
                        done.append(name)
        except (HostError, OSError) as error:
            progress.note(f"images are left for the VM to import: {error}")
            return done
    store.images.write_text(json.dumps(had | wanted))
    return done


def _remembered(store: Store) -> dict[str, str]:
    """Name → digest of what an earlier call has put there."""
    try:
        found = json.loads(store.images.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _mounted(store: Store) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmcell-store-") as folder:
        words: list[str | Path] = ["mount", "-o", "loop,noatime", store.path, folder]
        run_step(words, deadline_s=MOUNT_DEADLINE_S)
        try:
            yield Path(folder)
        finally:
            run_step(["umount", folder], deadline_s=MOUNT_DEADLINE_S)


@contextmanager
def _containerd(folder: Path, root: Path) -> Iterator[Path]:
    """Its socket, in `folder`; it has ended afterwards. Raises HostError with its last words."""
    root.mkdir(exist_ok=True)
    socket, log = folder / "c.sock", folder / "log"
    config = folder / "config.toml"
    config.write_text(CONFIG.format(root=root, state=folder / "state", socket=socket))
    with log.open("wb") as output:
        try:
            daemon = subprocess.Popen(
                ["containerd", "--config", config], stdout=output, stderr=output
            )
        except FileNotFoundError as error:
            raise HostError("containerd is not installed; run: vmcell setup --packages") from error
    try:
        _await_answer(daemon, socket, log)
        yield socket
    finally:
        daemon.terminate()
        try:
            daemon.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _await_answer(daemon: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    ask = ["ctr", "--address", str(socket), "--connect-timeout", "1s", "version"]
    while subprocess.run(ask, capture_output=True, check=False).returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
            raise HostError(f"a containerd for the store does not answer: {tail}")
        time.sleep(0.05)
