"""The node's zygote: one listens while noded runs, its own only where nobody else's does.

A zygote of systemd's, or one left by an earlier noded, is respected: a silent connection tells of
its end. What zygotes do, and that everything works without one, is vmcell_shim.zygote's to say.
"""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import threading

from vmcell_protos.errors import HostError

log = logging.getLogger("vmcell.noded")

PROGRAM = "containerd-shim-vmcell-v2"
# Longer than systemd waits before it starts its own again.
PAUSE_S = 2.0
STOP_WITHIN_S = 5.0


def find_program() -> str:
    """The shim's executable. HostError when PATH has none."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise HostError(f"{PROGRAM} is not in PATH; run `vmcell setup` to install it")
    return found


class ZygoteKeeper:
    """A thread of noded. `program` is run with the word `zygote` where nothing listens at
    `socket_path`; stop() ends what was started so, and nothing else."""

    def __init__(self, program: str, socket_path: str) -> None:
        self._program = program
        self._socket_path = socket_path
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._own: subprocess.Popen[bytes] | None = None
        self._others: socket.socket | None = None
        self._thread = threading.Thread(target=self._keep, name="zygote", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the zygote that was started here; its shims live on. Idempotent."""
        with self._lock:
            self._ending.set()
            if self._others is not None:
                self._others.shutdown(socket.SHUT_RDWR)
            if self._own is not None:
                self._own.terminate()
        self._thread.join(STOP_WITHIN_S)
        with self._lock:
            if self._own is not None:
                log.warning("the zygote did not end within %s s; killing it", STOP_WITHIN_S)
                self._own.kill()
        self._thread.join()

    def _keep(self) -> None:
        while not self._ending.is_set():
            if not self._watch():
                self._run()
            self._ending.wait(PAUSE_S)

    def _watch(self) -> bool:
        """False at once when nobody listens, else True when that zygote has ended."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                connection.connect(self._socket_path)
            except OSError:
                return False
            with self._lock:
                if self._ending.is_set():
                    return True
                self._others = connection
            try:
                connection.recv(1)
            except ConnectionResetError:
                return True
            finally:
                with self._lock:
                    self._others = None
        return True

    def _run(self) -> None:
        """Returns when the zygote started here has ended."""
        with self._lock:
            if self._ending.is_set():
                return
            try:
                own = subprocess.Popen(
                    [self._program, "zygote"], stdin=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                log.warning("cannot start a zygote, starts are slower: %s", error)
                return
            self._own = own
        status = own.wait()
        with self._lock:
            self._own = None
        if not self._ending.is_set():
            log.warning("the zygote ended with status %d; starting another", status)
