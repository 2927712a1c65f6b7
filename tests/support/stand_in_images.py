"""Images whose envd is a stand-in (stand_in_envd.c), for tests of noded on runc."""

from __future__ import annotations

import subprocess
from pathlib import Path

from real_containerd import RealContainerd, write_image

GOOD, BROKEN = "docker.io/test/good:1", "docker.io/test/broken:1"
REFUSES, SILENT = "docker.io/test/refuses:1", "docker.io/test/silent:1"
STARTS = "docker.io/test/starts:1"


def import_stand_ins(containerd: RealContainerd) -> None:
    """Imports GOOD (204), REFUSES (500), SILENT (no answer) and BROKEN (no envd in it).

    STARTS has a start command, which its envd, that of GOOD, does not know how to run.
    """
    envd = _compiled_envd(containerd.folder)
    _import(containerd, GOOD, envd, b"204 No Content")
    _import(containerd, REFUSES, envd, b"500 Broken")
    _import(containerd, SILENT, envd, b"")
    _import(containerd, BROKEN, None, b"")
    labels = {"io.vmcell.start": "serve", "io.vmcell.ready": "true"}
    _import(containerd, STARTS, envd, b"204 No Content", labels)


def _compiled_envd(folder: Path) -> bytes:
    source = Path(__file__).parent / "stand_in_envd.c"
    binary = folder / "envd"
    subprocess.run(["gcc", "-O1", "-static", "-o", binary, source], check=True, timeout=60)
    return binary.read_bytes()


def _import(
    containerd: RealContainerd,
    name: str,
    envd: bytes | None,
    answer: bytes,
    labels: dict[str, str] | None = None,
) -> None:
    files = {"answer": (answer, 0o644)}
    if envd is not None:
        files["bin/envd"] = (envd, 0o755)
    archive = containerd.folder / "image.tar"
    write_image(archive, name, files, labels=labels)
    containerd.ctr("images", "import", str(archive))
