"""Keeps the VM as the host is: what changed of the checkout, the builds and the configuration since
`up` is sent before each run.

The VM reads the host's root through a cache that never looks twice (virtiofs `cache=always`), which
is what makes it fast. Files of the checkout that changed meanwhile are written into the VM's
overlay, where they hide the old ones. Other host files stay as first read until `down`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.dev_ssh import ssh_command
from vmcell_tools.dev_state import DevVm, locked
from vmcell_tools.oci_image import KIND as IMAGE_KIND
from vmcell_tools.setup_host import compile_sources

CHECKOUT = Path(__file__).resolve().parents[2]
MANIFEST = "checkout.json"
NOT_SENT = frozenset(
    (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "build")
)
# What the VM has looked up stays as it was, missing files too, until dentries are dropped.
FORGET_HOST_FILES = "echo 2 >/proc/sys/vm/drop_caches"

Stamps = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a VM has: `files` of the checkout with inode, size in bytes and mtime_ns; `builds`, the
    OCI images of the cache, which a VM looks for by itself; `configuration`, the digests of its own
    files under /etc and /usr."""

    files: Stamps
    builds: list[str]
    configuration: dict[str, str]


def take_manifest(configuration: Mapping[str, bytes]) -> Manifest:
    """The host's side now; byte code is made first, so that it is sent too."""
    compile_sources()
    root = BuildCache.default().root
    return Manifest(
        files=dict(_walk(str(CHECKOUT), len(str(CHECKOUT)) + 1)),
        builds=sorted(path.name for path in (root / IMAGE_KIND).glob("[!.]*")),
        configuration={
            path: hashlib.sha256(content).hexdigest() for path, content in configuration.items()
        },
    )


def remember(directory: Path, manifest: Manifest) -> None:
    """Write down what the VM has, beside its state."""
    fresh = directory / f"{MANIFEST}.new"
    fresh.write_text(json.dumps(asdict(manifest)))
    fresh.replace(directory / MANIFEST)


def push_changes(vm: DevVm, configuration: Mapping[str, bytes]) -> bool:
    """Send what changed since the last push; False when nothing had."""
    with locked(vm.name, wait_s=60) as directory:
        before = Manifest(**json.loads((directory / MANIFEST).read_text()))
        now = take_manifest(configuration)
        if now == before:
            return False
        # A file replaced on the host is a stale handle in what the VM still remembers of it.
        _in_vm(vm, FORGET_HOST_FILES, b"")
        gone = [f"{CHECKOUT}/{path}" for path in before.files if path not in now.files]
        if gone:
            _in_vm(vm, f"rm -f -- {shlex.join(gone)}", b"")
        contents = {
            path: configuration[path]
            for path, digest in now.configuration.items()
            if before.configuration.get(path) != digest
        }
        changed = [path for path, stamp in now.files.items() if before.files.get(path) != stamp]
        if changed or contents:
            _in_vm(vm, "tar -x --unlink-first -C / -f -", archive(CHECKOUT, changed, contents))
        remember(directory, now)
    return True


def archive(root: Path, paths: Sequence[str], contents: Mapping[str, bytes]) -> bytes:
    """A tar, relative to /, of `paths` below `root` and of files with `contents`.

    A file that vanished meanwhile is left out. Contents that begin with `#!` are executable.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in paths:
            with suppress(FileNotFoundError):
                tar.add(root / path, arcname=str(root / path).lstrip("/"), recursive=False)
        for path, content in contents.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size = len(content)
            member.mtime = int(time.time())
            member.mode = 0o755 if content.startswith(b"#!") else 0o644
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _walk(directory: str, skipped_characters: int) -> Iterator[tuple[str, list[int]]]:
    """Relative path → inode, size in bytes and mtime_ns of each file and symbolic link."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in NOT_SENT:
                    yield from _walk(entry.path, skipped_characters)
            elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    stamp = [status.st_ino, status.st_size, status.st_mtime_ns]
                    yield entry.path[skipped_characters:], stamp


def _in_vm(vm: DevVm, script: str, stdin: bytes) -> None:
    done = subprocess.run(
        [*ssh_command(vm.directory, vm.ssh_port, "-T"), script],
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
