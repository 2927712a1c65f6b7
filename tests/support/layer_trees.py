"""Layers as snapshotters lay them out, the mounts that name them, and what an image holds."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vmcell_protos.task import Mount


def layer_dirs(directory: Path, count: int = 2) -> list[str]:
    """Directories as the overlayfs snapshotter names them, topmost first."""
    paths = []
    for number in range(count, 0, -1):
        path = directory / f"snapshots/{number}/fs"
        path.mkdir(parents=True)
        (path / f"file{number}").write_text(f"layer {number}")
        paths.append(str(path))
    return paths


def layer_images(directory: Path, count: int = 2, *mkfs: str) -> list[str]:
    """The same as EROFS images, as the erofs snapshotter names them, topmost first."""
    images = []
    for path in layer_dirs(directory, count):
        image = str(Path(path).with_name("layer.erofs"))
        flags = mkfs or ("-Enoinline_data",)
        subprocess.run(["mkfs.erofs", "--quiet", *flags, image, path], check=True)
        for inner in Path(path).iterdir():
            inner.unlink()
        images.append(image)
    return images


def overlay(lower: list[str], upper: str = "") -> Mount:
    options = ["index=off", f"lowerdir={':'.join(lower)}"]
    if upper:
        options += [f"upperdir={upper}", f"workdir={upper}/../work"]
    return Mount(type="overlay", source="overlay", options=options)


def read_image(image: str, directory: Path) -> dict[str, str]:
    """Every file of the image with its content; mounts it below `directory`, which needs root."""
    target = directory / "mounted"
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", image, target], check=True)
    try:
        return {
            str(path.relative_to(target)): path.read_text() if path.is_file() else ""
            for path in sorted(target.rglob("*"))
        }
    finally:
        subprocess.run(["umount", target], check=True)
