"""One container's cgroup v2: limits, members, counters, the kill of everything in it.

Source: Documentation/admin-guide/cgroup-v2.rst of Linux 6.12. The container's processes live in the
leaf `<root>/<id>`; what a container with a writable cgroup mount makes below it is killed, counted
and removed with it.
"""

from __future__ import annotations

import errno
import os
import signal

from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError, HostError

MAX_LISTED_PIDS = 4096
_MAX_NESTED = 1024
_REFUSALS = frozenset((errno.EINVAL, errno.ERANGE, errno.ENOENT, errno.EOPNOTSUPP))
_MEMORY_LIMIT = "memory.max"
_SWAP_LIMIT = "memory.swap.max"
_READ_BYTES = 256 << 10


def enable_controllers(directory: str) -> None:
    """Hand every controller that `directory` has down to its children."""
    names = _read(f"{directory}/cgroup.controllers").split()
    for name in names:
        with attempt(f"enable cgroup controller {name} in {directory}"):
            _write(f"{directory}/cgroup.subtree_control", f"+{name}")


def _read(path: str) -> str:
    """The file's text, "" when it does not exist (its controller is off)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        parts = []
        while part := os.read(fd, _READ_BYTES):
            parts.append(part)
            if len(parts) == 16:
                break
        return b"".join(parts).decode("ascii", "replace")
    except OSError as error:  # ENODEV: the cgroup was removed meanwhile
        raise HostError(f"read {path}: {error.strerror}", code="internal") from error
    finally:
        os.close(fd)


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode() or b"\n")  # a write of nothing reaches no file of the kernel's
    finally:
        os.close(fd)


def _counters(text: str) -> dict[str, int]:
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _number(text: str) -> int:
    """A single value; "max" and an absent file are 0."""
    text = text.strip()
    return int(text) if text.isdigit() else 0


class Cgroup:
    """The cgroup at `path`; the caller makes one for each container and removes it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self, files: dict[str, str]) -> None:
        """Make it and write the limits; raises HostError naming the file, leaving nothing."""
        with attempt(f"make cgroup {self.path}"):
            os.makedirs(self.path, mode=0o755, exist_ok=False)
        try:
            for name, value in files.items():
                if self._has_no_use_for(name):
                    continue
                with attempt(f"set {name} to {value!r}"):
                    _write(f"{self.path}/{name}", value)
        except HostError:
            os.rmdir(self.path)
            raise

    def _has_no_use_for(self, name: str) -> bool:
        """A kernel without swap keeps to any limit of it."""
        return name == _SWAP_LIMIT and not os.path.exists(f"{self.path}/{name}")

    def update(self, files: dict[str, str]) -> None:
        """Change limits; a value that is refused is named in the error, and what was written
        before it is put back.

        The order is that of `files`, but memory.max comes last: it alone can cost the container
        something (the kernel reclaims, then kills), so nothing may fail after it. May block for as
        long as the kernel reclaims.
        """
        names = [name for name in files if not self._has_no_use_for(name)]
        names.sort(key=lambda name: name == _MEMORY_LIMIT)
        old = {name: self.text(name) for name in names}
        for index, name in enumerate(names):
            try:
                _write(f"{self.path}/{name}", files[name])
            except OSError as error:
                text = f"set {name} to {files[name]!r}: {error.strerror}"
                if kept := self._put_back(old, names[:index]):
                    text += f"; {', '.join(kept)} could not be set back"
                if error.errno in _REFUSALS:
                    raise CallerError(text) from error
                raise HostError(text, code="internal") from error

    def _put_back(self, old: dict[str, str], names: list[str]) -> list[str]:
        """The names whose files would not take their old value."""
        kept = []
        for name in reversed(names):
            try:
                _write(f"{self.path}/{name}", old[name])
            except OSError:
                kept.append(name)
        return kept

    def freeze(self, frozen: bool) -> None:
        """Ask for every process in it and below to stand still, or to go on; `cgroup.events` tells
        when they do."""
        with attempt(f"{'freeze' if frozen else 'thaw'} cgroup {self.path}"):
            _write(f"{self.path}/cgroup.freeze", "1" if frozen else "0")

    def open_procs(self) -> int:
        """A descriptor; "0" written to it moves the writer into this cgroup."""
        with attempt(f"open cgroup {self.path}"):
            return os.open(f"{self.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def _directories(self) -> list[str]:
        """This cgroup and those below, parents first."""
        found = [self.path]
        for directory in found:
            if len(found) > _MAX_NESTED:
                break
            try:
                with os.scandir(directory) as entries:
                    found += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
            except OSError:  # the container has removed it meanwhile
                continue
        return found

    def pids(self) -> list[int]:
        """Process ids in the agent's namespace, at most MAX_LISTED_PIDS."""
        pids: list[int] = []
        for directory in self._directories():
            try:
                pids += [int(word) for word in _read(f"{directory}/cgroup.procs").split()]
            except HostError:
                # Below: removed meanwhile, or threaded, whose processes the domain above lists.
                if directory == self.path:
                    raise
            if len(pids) >= MAX_LISTED_PIDS:
                break
        return [pid for pid in pids[:MAX_LISTED_PIDS] if pid > 0]

    def signal_all(self, number: int) -> None:
        """Send the signal to every member; SIGKILL by cgroup.kill, which no fork outruns."""
        if number == signal.SIGKILL:
            with attempt(f"kill cgroup {self.path}"):
                try:
                    _write(f"{self.path}/cgroup.kill", "1")
                except FileNotFoundError:  # removed before, so nobody is in it
                    return
            return
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def populated(self) -> bool:
        """Whether a live process is in it or below."""
        return _counters(_read(f"{self.path}/cgroup.events")).get("populated", 0) != 0

    @property
    def stands_still(self) -> bool:
        """Whether every process in it and below is frozen."""
        return _counters(_read(f"{self.path}/cgroup.events")).get("frozen", 0) != 0

    def remove(self) -> bool:
        """Remove it with what is below; False while the kernel still holds it."""
        for directory in reversed(self._directories()):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def cpu(self) -> dict[str, int]:
        """cpu.stat; microseconds."""
        return _counters(_read(f"{self.path}/cpu.stat"))

    def memory(self) -> dict[str, int]:
        """memory.stat; bytes, and counts of events."""
        return _counters(_read(f"{self.path}/memory.stat"))

    def memory_events(self) -> dict[str, int]:
        return _counters(_read(f"{self.path}/memory.events"))

    @property
    def oom_kills(self) -> int:
        """Processes in it and below that an OOM killer has ended."""
        return self.memory_events().get("oom_kill", 0)

    def text(self, name: str) -> str:
        """A file's content without white space around it; "" when its controller is off."""
        return _read(f"{self.path}/{name}").strip()

    def value(self, name: str) -> int:
        """A file with one number; 0 for "max" and for a controller that is off."""
        return _number(_read(f"{self.path}/{name}"))
