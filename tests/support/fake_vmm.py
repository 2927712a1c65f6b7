"""What `vmcell_runtime.handle` offers, with a fake agent's process where the VMM would be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from vmcell_protos.errors import GuestError, HostError
from vmcell_runtime.config import MachineConfig
from vmcell_runtime.handle import SavedFiles, VmmExit
from vmcell_runtime.vmm_uid import UidRange

PROGRAM = Path(__file__).with_name("fake_agent.py")
ROOT = Path(__file__).resolve().parents[2]


class FakeVmm:
    """One running fake; the behaviour comes from FAKE_BEHAVIOUR, as the process inherits it.

    What is saved of it is what its container runs; a restored one runs that again, from its start.
    """

    def __init__(
        self, config: MachineConfig, descriptors: Sequence[int], saved: SavedFiles | None
    ) -> None:
        behaviour = json.loads(os.environ.get("FAKE_BEHAVIOUR", "{}"))
        if saved is not None:
            memory = os.pread(saved.memory_fd, 1 << 20, 0).rstrip(b"\0")
            behaviour["restored"] = json.loads(memory)
            assert os.pread(saved.state_fd, 100, 0).startswith(b"fake state of ")
        if "refuse" in behaviour:
            raise HostError(behaviour["refuse"])
        assert config.console_descriptor is not None
        os.write(descriptors[config.console_descriptor], behaviour.get("console", "").encode())
        self.config = config
        self.plugged: dict[int, str] = {}
        self.balloon_mib = 0
        self.stands_still = saved is not None
        self._control, theirs = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        self._directory = tempfile.TemporaryDirectory()
        self._address = os.path.join(self._directory.name, "streams")
        listener.bind(self._address)
        listener.listen(64)
        fds = (theirs.fileno(), listener.fileno())
        self._popen = subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, fds), json.dumps(behaviour)],
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": f"{ROOT}/protos"},
        )
        theirs.close()
        listener.close()
        self.pid = self._popen.pid
        self._waiting = threading.Lock()

    def accept_vsock(self, port: int) -> socket.socket:
        assert port in (self.config.vsock.listen_ports if self.config.vsock else ())
        return self._control

    def plug_pmem(self, window: int, fd: int) -> None:
        self._plug(window, fd)

    def plug_blk(self, window: int, fd: int, read_only: bool = False) -> None:
        self._plug(window, fd)

    def _plug(self, window: int, fd: int) -> None:
        assert window in self.config.spare_window_numbers
        assert window not in self.plugged
        self.plugged[window] = os.readlink(f"/proc/self/fd/{fd}")

    def unplug(self, window: int) -> None:
        del self.plugged[window]

    def pause(self) -> None:
        self._popen.send_signal(signal.SIGSTOP)
        self.stands_still = True

    def resume(self) -> None:
        self.stands_still = False
        self._popen.send_signal(signal.SIGCONT)

    def save(self, memory_fd: int, state_fd: int) -> int:
        assert self.stands_still
        memory = Path(self._directory.name, "container.json").read_bytes()
        os.pwrite(memory_fd, memory, 0)
        os.write(state_fd, b"fake state of %d" % self.pid)
        return len(memory)

    def set_balloon(self, mib: int) -> None:
        self.balloon_mib = mib

    def connect_vsock(self, port: int) -> socket.socket:
        assert port == 1025
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(self._address)
        except OSError as error:
            stream.close()
            raise GuestError(f"nothing listens on port {port}") from error
        return stream

    def wait_exit(self, timeout_s: float | None = None) -> VmmExit:
        code = self._popen.wait(timeout_s)
        if code == 0:
            return VmmExit("guest_shutdown", "Restarting system")
        return VmmExit("killed", f"signal {-code} ended the VMM")

    def kill(self) -> None:
        self._popen.kill()

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._control.close()
        self._directory.cleanup()


def spawn(
    config: MachineConfig,
    descriptors: Sequence[int],
    *,
    log_fd: int,
    saved: SavedFiles | None = None,
    uids: UidRange,
) -> FakeVmm:
    """Stands in for vmcell_runtime.handle.spawn."""
    uids.check()
    return FakeVmm(config, descriptors, saved)
