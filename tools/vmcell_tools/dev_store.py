"""A disk that outlives dev VMs: containerd's root and vmcell's image cache, kept under a key.

`<cache>/devvm/store/<key>.ext4` is sparse. Whoever uses it holds a lock on it, and QEMU inherits
that lock. QEMU writes it without flushes, which a killed QEMU survives and a crashed host may not;
so it is checked before each use and made anew when it is beyond repair.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.file_lock import try_lock
from vmcell_tools.build_step import run_step
from vmcell_tools.dev_state import cache_directory
from vmcell_tools.progress import Progress

SIZE_BYTES = 16 << 30
STORES_KEPT = 3
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TOOL_DEADLINE_S = 120


@dataclass(frozen=True, kw_only=True)
class Store:
    """A checked file system in a file; `lock` is a descriptor that QEMU must inherit."""

    path: Path
    lock: int

    @property
    def images(self) -> Path:
        """Where dev_seed remembers what is in it; gone with it."""
        return self.path.with_suffix(".images")


def check_key(key: str) -> None:
    """CallerError for a key that cannot be a file name."""
    if not KEY_PATTERN.fullmatch(key):
        raise CallerError(f"store key {key!r} must be 1 to 128 of letters, digits, '.', '_', '-'")


@contextmanager
def opened_store(key: str | None, progress: Progress) -> Iterator[Store | None]:
    """The store of that key, made when it is not there; None for no key.

    Raises CallerError when a running dev VM has it. The lock ends with the last of its holders.
    """
    if key is None:
        yield None
        return
    check_key(key)
    home = cache_directory() / "store"
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{key}.ext4"
    lock = _locked(path)
    if lock is None:
        raise CallerError(f"store {key!r} is in use by another dev VM; take it down or use another")
    try:
        if not _usable(path):
            progress.step(f"making the disk of store {key}")
            _make(path, lock)
        os.utime(path)
        _drop_old(home)
        yield Store(path=path, lock=lock)
    finally:
        os.close(lock)


def _locked(path: Path) -> int | None:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not try_lock(lock):
        os.close(lock)
        return None
    return lock


def _usable(path: Path) -> bool:
    """Whether e2fsck (exit status 0 or 1: clean, or repaired) leaves a file system there."""
    if path.stat().st_size != SIZE_BYTES:
        return False
    try:
        run_step(["e2fsck", "-p", path], deadline_s=TOOL_DEADLINE_S)
    except HostError:
        return _clean_now(path)
    return True


def _clean_now(path: Path) -> bool:
    try:
        run_step(["e2fsck", "-n", path], deadline_s=TOOL_DEADLINE_S)
    except HostError:
        return False
    return True


def _make(path: Path, lock: int) -> None:
    path.with_suffix(".images").unlink(missing_ok=True)
    os.ftruncate(lock, 0)
    os.ftruncate(lock, SIZE_BYTES)
    try:
        run_step(["mkfs.ext4", "-q", "-F", "-m", "0", path], deadline_s=TOOL_DEADLINE_S)
    except (HostError, OSError):
        os.ftruncate(lock, 0)
        raise


def _drop_old(home: Path) -> None:
    """Removes all but the newest stores, leaving those in use."""
    stores = sorted(home.glob("*.ext4"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in stores[STORES_KEPT:]:
        lock = _locked(old)
        if lock is not None:
            with suppress(FileNotFoundError):
                old.unlink()
            old.with_suffix(".images").unlink(missing_ok=True)
            os.close(lock)
