"""The live host directories of one sandbox: what its guest sees below the virtio-fs tag `vmcell`.

Each is a bind mount on `share/<number>` that exists in one place only, the mount namespace of the
sandbox's virtiofsd. It is made as a tree attached nowhere, given its flags (read-only reaches every
mount below, at once), and only then carried into that namespace. So the host's mount table never
has it: nothing can be left mounted, or removed recursively through it, and the end of the daemon,
however it comes, is the end of the mounts. `delete` needs to know the daemon's processes only.
"""

from __future__ import annotations

import os
import stat
import threading
from functools import partial

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim import mount_calls
from vmcell_shim.sandbox_files import make_directory
from vmcell_shim.virtiofsd import Virtiofsd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmcell_shim.living import Living

TAG = "vmcell"
DIRECTORY = "share"
STEP_TIMEOUT_S = 10.0
MAX_MOUNTS = 256
_SAFE = mount_calls.MOUNT_ATTR_NOSUID | mount_calls.MOUNT_ATTR_NODEV


class Share:
    """The share of one sandbox, made whole or not at all. Any thread may call; `close` idempotent.

    `helpers` are the daemon's processes, for state.json.
    """

    def __init__(self, state_directory: str, on_end: Callable[[str], None]) -> None:
        """Starts the daemon. HostError, and then nothing is left.

        `on_end` is told, once and by a thread of its own, when the daemon ends before `close`.
        """
        self._directory = os.path.join(state_directory, DIRECTORY)
        self._lock = threading.Lock()
        self._closing = False
        self._ended = threading.Event()
        self._numbers: set[int] = set()
        self._next_number = 0
        self._on_end = on_end
        try:
            make_directory(self._directory)
            self._daemon = Virtiofsd(self._directory)
        except (OSError, HostError) as error:
            self._remove_directory()
            if isinstance(error, HostError):
                raise
            raise HostError(f"cannot make {self._directory}: {error}") from error
        threading.Thread(target=self._watch, name="virtiofsd", daemon=True).start()
        try:
            self._inside(_protect_root, "protect the share's root")
        except HostError:
            self.close()
            raise

    def take_connection(self) -> socket.socket:
        """For the VMM (`FsConfig`), once, and the caller's to close as soon as the VMM has it: the
        daemon ends when the last copy is closed, so it does not outlive the VMM."""
        return self._daemon.take_connection()

    @property
    def helpers(self) -> list[Living]:
        return self._daemon.helpers

    def add(
        self, source: str, *, read_only: bool, recursive: bool = True, follow: bool = False
    ) -> int:
        """Shares a directory or regular file of the host; the number under which the guest has it.

        `recursive` takes the mounts below it along (rbind); with `follow` such that come and go
        later on the host do so in the share (rslave; those are not made read-only). Symlinks in
        `source` are followed. CallerError for what is neither, HostError for the rest.
        """
        tree, is_directory = _tree(source, read_only=read_only, recursive=recursive, follow=follow)
        try:
            with self._lock:
                self._check_alive(f"share {source}")
                if len(self._numbers) >= MAX_MOUNTS:
                    raise CallerError(
                        f"{source}: a sandbox shares {MAX_MOUNTS} directories at most"
                    )
                number = self._next_number
                self._next_number += 1
                try:
                    self._numbers.add(number)
                    self._make_place(number, is_directory=is_directory)
                    self._inside(partial(mount_calls.attach, tree, f"/{number}"), f"share {source}")
                except HostError:
                    self._remove_place(number)
                    raise
        finally:
            os.close(tree)
        return number

    def remove(self, number: int) -> None:
        """Takes a directory away from the guest, whose kernel may believe in it for another second;
        what is open or mounted there stays so until the guest lets go of it. CallerError for a
        number that is none, HostError for the rest."""
        with self._lock:
            if number not in self._numbers:
                raise CallerError(f"the sandbox shares no directory under number {number}")
            if not self._ended.is_set():
                self._inside(partial(mount_calls.detach, f"/{number}"), f"take share {number} away")
            self._remove_place(number)

    def close(self) -> None:
        """Ends the daemon, and by that every mount. HostError when it does not end: then a file
        system it waits for does not answer, and it will end when that does."""
        self._closing = True
        over = self._daemon.kill()
        if over:
            self._ended.wait()  # not for its whole thread: `on_end` may be what calls this
        with self._lock:
            if over:
                self._daemon.close()
            for number in sorted(self._numbers):
                self._remove_place(number)
            self._remove_directory()
        if not over:
            pids = ", ".join(str(process.pid) for process in self.helpers)
            raise HostError(f"virtiofsd ({pids}) is killed but hangs; does a shared disk answer?")

    def _watch(self) -> None:
        self._daemon.wait_end()
        said = self._daemon.last_words or "without a word"
        self._ended.set()
        self._daemon.kill()  # the one that serves, where the other was killed alone
        if not self._closing:
            self._on_end(f"virtiofsd has ended: {said}")

    def _inside(self, step: Callable[[], None], what: str) -> None:
        """Runs `step` where the share is the root."""
        self._check_alive(what)
        mount_calls.in_namespace_of(self._daemon.server_pidfd, step, what, STEP_TIMEOUT_S)

    def _check_alive(self, what: str) -> None:
        if self._closing or self._ended.is_set():
            raise HostError(f"{what}: virtiofsd has ended", code="unavailable")

    def _make_place(self, number: int, *, is_directory: bool) -> None:
        path = os.path.join(self._directory, str(number))
        try:
            if is_directory:
                os.mkdir(path, 0o755)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise HostError(f"cannot make {path}: {error}") from error

    def _remove_place(self, number: int) -> None:
        """Also where a mount still is on it: the kernel detaches those of other namespaces."""
        self._numbers.discard(number)
        path = os.path.join(self._directory, str(number))
        try:
            if os.path.isdir(path):
                os.rmdir(path)
            elif os.path.exists(path):
                os.unlink(path)
        except OSError as error:
            raise HostError(f"cannot remove {path}: {error}") from error

    def _remove_directory(self) -> None:
        try:
            os.rmdir(self._directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError(f"cannot remove {self._directory}: {error}") from error


def _protect_root() -> None:
    """The guest must not write beside its directories: it would fill the host's /run."""
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        attributes = _SAFE | mount_calls.MOUNT_ATTR_RDONLY
        mount_calls.set_attributes(root, attributes, mount_calls.MS_PRIVATE, recursive=False)
    finally:
        os.close(root)


def _tree(source: str, *, read_only: bool, recursive: bool, follow: bool) -> tuple[int, bool]:
    """A tree with all its flags, and whether it is a directory."""
    found: list[tuple[int, int]] = []
    abandoned = False

    def take() -> None:
        tree = mount_calls.open_tree(source, recursive=recursive)
        try:
            attributes = _SAFE | (mount_calls.MOUNT_ATTR_RDONLY if read_only else 0)
            propagation = mount_calls.MS_SLAVE if follow else mount_calls.MS_PRIVATE
            mount_calls.set_attributes(tree, attributes, propagation, recursive=recursive)
            mode = os.fstat(tree).st_mode
        except BaseException:
            os.close(tree)
            raise
        if abandoned:
            os.close(tree)
        else:
            found.append((tree, mode))

    try:
        mount_calls.in_time(take, f"share {source}", STEP_TIMEOUT_S)
    except HostError:
        abandoned = True
        raise
    tree, mode = found[0]
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        os.close(tree)
        raise CallerError(
            f"{source} is neither a directory nor a regular file; it cannot be shared"
        )
    return tree, stat.S_ISDIR(mode)
