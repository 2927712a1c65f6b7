"""Keeps the checkout in the VM as it is on the host: what changed since `up` is sent before a run.

The VM reads the host's root through a cache that never looks twice (virtiofs `cache=always`), which
is what makes it fast. Files of the checkout that changed meanwhile are written into the VM's
overlay instead, where they hide the old ones. Other host files stay as first read until `down`.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.dev_ssh import ssh_command
from vmcell_tools.dev_state import DevVm, locked

CHECKOUT = Path(__file__).resolve().parents[2]
MANIFEST = "checkout.json"
NOT_SENT = frozenset(
    (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "build")
)

Manifest = dict[str, list[int]]


def scan(root: Path) -> Manifest:
    """Relative path → inode, size in bytes and mtime_ns of each file and symbolic link."""
    return {path: stamp for path, stamp in _walk(str(root), len(str(root)) + 1)}


def _walk(directory: str, skip_bytes: int) -> Iterator[tuple[str, list[int]]]:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in NOT_SENT:
                    yield from _walk(entry.path, skip_bytes)
            elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield (
                        entry.path[skip_bytes:],
                        [status.st_ino, status.st_size, status.st_mtime_ns],
                    )


def remember(directory: Path, manifest: Manifest) -> None:
    """Write down what the VM has, beside its state."""
    fresh = directory / f"{MANIFEST}.new"
    fresh.write_text(json.dumps(manifest))
    fresh.replace(directory / MANIFEST)


def push_changes(vm: DevVm) -> int:
    """Send what changed since the last push; returns the number of files sent or removed."""
    if not (CHECKOUT / "setup.cfg").exists():
        return 0
    with locked(vm.name, wait_s=60) as directory:
        before: Manifest = json.loads((directory / MANIFEST).read_text())
        now = scan(CHECKOUT)
        changed = [path for path, stamp in now.items() if before.get(path) != stamp]
        gone = [path for path in before if path not in now]
        if gone:
            _in_checkout(vm, f"rm -f -- {shlex.join(gone)}", b"")
        if changed:
            _in_checkout(vm, "tar -xf -", archive(CHECKOUT, changed))
        if gone or changed:
            remember(directory, now)
        return len(changed) + len(gone)


def archive(root: Path, paths: list[str]) -> bytes:
    """A tar of `paths` below `root`; a file that vanished meanwhile is left out, for next time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in paths:
            with suppress(FileNotFoundError):
                tar.add(root / path, arcname=path, recursive=False)
    return buffer.getvalue()


def _in_checkout(vm: DevVm, script: str, stdin: bytes) -> None:
    line = f"mkdir -p {shlex.quote(str(CHECKOUT))} && cd {shlex.quote(str(CHECKOUT))} && {script}"
    done = subprocess.run(
        [*ssh_command(vm.directory, vm.ssh_port, "-T"), line],
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise HostError(
            f"sending changed files to dev VM {vm.name!r} failed:"
            f" {done.stderr.decode(errors='replace').strip()[-400:]}"
        )
