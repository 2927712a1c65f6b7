"""One microVM with the agent in it: booted, talked to, ended.

The VMM is a process of its own; this owns its handle, the descriptors given to it and the control
connection. Threads: one waits for the VMM's end. Nothing here holds a lock while a guest is slow,
and kill() works from any thread at any time, also in the middle of boot().

The agent is hostile. Its answers are bounded, its refusals are told on in printable words and with
the blame where it belongs, and an answer to no question ends it.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import NamedTuple

from vmcell_protos.agent import (
    AttachDeviceRequest,
    AttachDeviceResponse,
    ConfigureGuestRequest,
    DetachDeviceRequest,
    HelloRequest,
    HelloResponse,
    PrepareSnapshotRequest,
    ResumeGuestRequest,
)
from vmcell_protos.errors import CallerError, GuestError, HostError, VmcellError
from vmcell_protos.wellknown import Empty
from vmcell_protos.wire import WireError
from vmcell_runtime import handle
from vmcell_shim.binds import FILE_LIMIT_BYTES
from vmcell_shim.client import ConnectionLost, TtrpcClient
from vmcell_shim.disk import open_disk
from vmcell_shim.journal import printable
from vmcell_shim.shape import (
    CONTROL_PORT,
    FORWARD_PORT,
    STREAM_PORT,
    GuestShape,
    machine_config,
    open_file,
)
from vmcell_shim.sparse import copy_sparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import TypeVar

    from vmcell_protos.wire import Message
    from vmcell_runtime.handle import VmmExit, VmmHandle
    from vmcell_shim.journal import Journal
    from vmcell_shim.snapshot_manifest import Manifest

    M = TypeVar("M", bound=Message)

SERVICE = "vmcell.agent.v1.Agent"
_CONSOLE_LINES = 5
_ENTROPY_BYTES = 64
_MACHINE_ID_BYTES = 16
_REAP_S = 5.0
_PLUG_S = 10.0
# It writes back what its disks have not.
_PREPARE_S = 60.0
_WAKE_S = 30.0
# The longest answer there is carries one file.
_ANSWER_BYTES = FILE_LIMIT_BYTES + (64 << 10)
# memory.stat has some fifty rows, and there are four such maps.
_ANSWER_ITEMS = 4096
_SAID_CHARACTERS = 2000
# What an agent refuses because of what was asked; anything else is its own failure.
_REFUSALS = (
    *("invalid_argument", "not_found", "already_exists", "permission_denied", "out_of_range"),
    *("failed_precondition", "resource_exhausted", "unimplemented"),
)


class Plugged(NamedTuple):
    """A file that became a device of the running guest: its window, its name there ("pmem2")."""

    window: int
    name: str


class Guest:
    """`on_end` runs once, in a thread of its own, when the VMM has ended."""

    def __init__(self, journal: Journal, on_end: Callable[[], None]) -> None:
        self._journal = journal
        self._on_end = on_end
        self._lock = threading.Lock()
        self._handle: VmmHandle | None = None
        self._agent: TtrpcClient | None = None
        self._killed = False
        self._stopping = False
        self._closed = False
        self._free_windows: list[int] = []
        # How containers that stand still for a snapshot are made to go on; None: none do.
        self._wake: ResumeGuestRequest | None = None
        self._memory_fd = -1
        self._memory_bytes = 0
        self._memory_unknown = False
        self._stream_ids = itertools.count(1)
        self.end: VmmExit | None = None
        self.ended = threading.Event()

    @property
    def pid(self) -> int:
        """The VMM's pid; 0 before there is one."""
        return self._handle.pid if self._handle else 0

    def boot(
        self, shape: GuestShape, deadline: float, on_vmm: Callable[[int], None]
    ) -> HelloResponse:
        """Starts the VMM and waits until the agent is configured, or restores it and waits until
        the agent is there, with every container standing still until wake().

        `on_vmm` gets the VMM's pid.

        `deadline` in time.monotonic() seconds. Raises VmcellError whose sentence carries the VMM's
        end reason and the console's last lines; the VMM is ended then.
        """
        try:
            vmm = self._spawn(shape)
            on_vmm(vmm.pid)
            return self._greet(vmm, shape, deadline)
        except VmcellError as error:
            if isinstance(error, ConnectionLost):
                # A guest that gave up takes its VMM along; its reason comes a moment later.
                self.ended.wait(_REAP_S)
            end = self.end
            self.kill()
            if self._handle is not None:
                self.ended.wait(_REAP_S)
            raise _boot_error(shape, error, end) from error

    def call(self, method: str, request: Message, answer: type[M], timeout_s: float | None) -> M:
        """One call to the agent. Raises HostError as TtrpcClient.call does, CallerError for what
        the agent refuses, GuestError for what it fails at and for an answer that is none."""
        agent = self._agent
        if agent is None:
            raise HostError(f"there is no guest to ask for {method}", code="failed_precondition")
        try:
            return agent.call(SERVICE, method, request, answer, timeout_s)
        except WireError as error:
            said = printable(str(error), _SAID_CHARACTERS)
            raise GuestError(f"the guest's answer to {method} is none: {said}") from error
        except (CallerError, HostError):
            raise
        except VmcellError as error:
            kind = CallerError if error.code in _REFUSALS else GuestError
            said = printable(str(error), _SAID_CHARACTERS)
            raise kind(said or f"{method} failed", code=error.code) from error

    def next_stream_id(self) -> int:
        """An id that no other stream of this guest has."""
        return next(self._stream_ids)

    def dial(self, stream_id: int) -> socket.socket:
        """The vsock stream of that id; the caller owns it. Raises HostError."""
        stream = self._running().connect_vsock(STREAM_PORT)
        try:
            stream.sendall(stream_id.to_bytes(8, "little"))
        except OSError as error:
            stream.close()
            raise HostError(f"the guest closed stream {stream_id} at once: {error}") from error
        return stream

    def dial_forward(self, port: int) -> socket.socket:
        """A stream to a port of the guest's loopback, the caller's to close. VmcellError."""
        stream = self._running().connect_vsock(FORWARD_PORT)
        try:
            stream.sendall(port.to_bytes(2, "little"))
        except OSError as error:
            stream.close()
            raise HostError(f"the guest takes no forward to port {port}: {error}") from error
        return stream

    def plug(self, path: str, *, image: bool) -> Plugged:
        """Makes the file a device of the running guest: an EROFS `image` on pmem, else a disk.

        Raises VmcellError: resource_exhausted when every window is taken.
        """
        vmm = self._running()
        with self._lock:
            if not self._free_windows:
                raise CallerError(
                    "the pod's microVM has no window left for another device; "
                    "use fewer containers in the pod",
                    code="resource_exhausted",
                )
            window = self._free_windows.pop(0)
        try:
            fd = open_file(path, os.O_RDONLY) if image else open_disk(path)
            try:
                if image:
                    vmm.plug_pmem(window, fd)
                else:
                    vmm.plug_blk(window, fd)
            finally:
                os.close(fd)
            try:
                request = AttachDeviceRequest(window=window)
                name = self.call("AttachDevice", request, AttachDeviceResponse, _PLUG_S).name
            except BaseException:
                vmm.unplug(window)
                raise
        except BaseException:
            with self._lock:
                self._free_windows.append(window)
            raise
        return Plugged(window, name)

    def unplug(self, device: Plugged) -> None:
        """Takes a device away from the guest and then from the VM. Raises VmcellError; a device
        that the guest does not let go keeps its window."""
        self.call("DetachDevice", DetachDeviceRequest(window=device.window), Empty, _PLUG_S)
        self._running().unplug(device.window)
        with self._lock:
            self._free_windows.append(device.window)

    def pause(self) -> None:
        """Every vCPU stands still when this returns. Idempotent; raises VmcellError."""
        self._running().pause()

    def resume(self) -> None:
        """The vCPUs go on, and the guest's wall clock is right again. Raises VmcellError."""
        self._running().resume()
        if self._wake is not None:
            self.wake()
            return
        request = ConfigureGuestRequest(unix_time_ns=time.time_ns())
        self.call("ConfigureGuest", request, Empty, _PLUG_S)

    def stand_still(self, *, drop_caches: bool) -> None:
        """Every container is frozen and its disks are written back, then every vCPU stands still,
        also of a guest that was paused. Raises VmcellError: it goes on then as before."""
        vmm = self._running()
        vmm.resume()
        # Before it is asked: one that does not answer may have frozen them.
        self._wake = ResumeGuestRequest()
        try:
            request = PrepareSnapshotRequest(drop_caches=drop_caches)
            self.call("PrepareSnapshot", request, Empty, _PREPARE_S)
            vmm.pause()
        except VmcellError:
            try:
                self.wake()
            except VmcellError as error:
                self._journal.error(f"the guest does not go on after a failed snapshot: {error}")
            raise

    def wake(self) -> None:
        """Containers that stand still for a snapshot go on: in a restored guest as somebody else,
        in the one that was saved as before, at the right time. Raises VmcellError; the next call
        tries again."""
        request = self._wake or ResumeGuestRequest()
        guest = request.guest or ConfigureGuestRequest()
        guest.unix_time_ns = time.time_ns()
        guest.entropy = os.urandom(_ENTROPY_BYTES)
        request.guest = guest
        self.call("ResumeGuest", request, Empty, _WAKE_S)
        self._wake = None

    @property
    def stands_still(self) -> bool:
        """Its containers wait for wake()."""
        return self._wake is not None

    def copy_memory(self, writer: int) -> None:
        """Into an empty file what save() is to be given: what the memory last was saved to or came
        from, or a hole of its length. The vCPUs may run. Raises OSError, HostError."""
        if self._memory_unknown:
            raise HostError(
                "nobody knows what file the guest's memory stands on: its VMM did not answer when "
                "it was last to be saved; it cannot be saved any more",
                code="failed_precondition",
            )
        if self._memory_fd >= 0:
            copy_sparse(self._memory_fd, writer)
        else:
            os.ftruncate(writer, self._memory_bytes)

    def save(self, memory_fd: int, state_fd: int) -> int:
        """The guest that stands still is in two files; how many bytes of memory were written.

        `memory_fd` as copy_memory() has filled it; nobody may write to that file afterwards. Both
        stay the caller's. Raises VmcellError, OSError.
        """
        # One that cannot be written by: it is the guest's memory from here on.
        fresh = os.open(f"/proc/self/fd/{memory_fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            written = self._running().save(memory_fd, state_fd)
        except BaseException as error:
            os.close(fresh)
            # It may do it yet, and then its memory is the new file.
            self._memory_unknown |= getattr(error, "code", "") == "deadline_exceeded"
            raise
        self._keep_memory(fresh)
        return written

    def _keep_memory(self, fd: int) -> None:
        old, self._memory_fd = self._memory_fd, fd
        if old >= 0:
            os.close(old)

    def give_back(self, memory_mib: int) -> None:
        """Asks the guest to leave that much of its memory to the host. Raises VmcellError."""
        self._running().set_balloon(memory_mib)

    def _running(self) -> VmmHandle:
        vmm = self._handle
        if vmm is None or self.ended.is_set():
            raise HostError("the microVM has ended", code="failed_precondition")
        return vmm

    def kill(self) -> None:
        """Ends the VMM at once, or makes a boot that has not begun fail. Idempotent."""
        with self._lock:
            self._killed = self._stopping = True
            vmm = None if self._closed else self._handle
        if vmm is not None and not self.ended.is_set():
            vmm.kill()

    def shut_down(self, timeout_s: float) -> None:
        """Lets the guest write back its disk and end itself; kills it after `timeout_s`."""
        self._stopping = True
        until = time.monotonic() + timeout_s
        try:
            self.call("Shutdown", Empty(), Empty, timeout_s)
        except VmcellError as error:
            self._journal.warning(f"the guest did not take its shutdown: {error}")
        if not self.ended.wait(max(0.0, until - time.monotonic())):
            self._journal.warning(f"the guest has not ended {timeout_s:g} s after its shutdown")
            self.kill()

    def close(self) -> None:
        """Nothing of the VM is left: killed, reaped, descriptors closed. Idempotent."""
        self.kill()
        vmm = self._handle
        if vmm is None:
            self._keep_memory(-1)
            return
        if not self.ended.wait(_REAP_S):
            raise HostError(f"VMM {vmm.pid} does not end {_REAP_S:g} s after SIGKILL")
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            if self._agent is not None:
                self._agent.close()
            vmm.close()
            self._keep_memory(-1)

    def _spawn(self, shape: GuestShape) -> VmmHandle:
        descriptors: list[int] = []
        log = -1
        try:
            config = machine_config(shape, descriptors)
            log = open_file(shape.vmm_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            self._free_windows = list(config.spare_window_numbers)
            self._memory_bytes = shape.memory_mib << 20
            saved = None
            if shape.saved is not None:
                saved = handle.SavedFiles(shape.saved.memory_fd, shape.saved.state_fd)
                self._keep_memory(os.dup(shape.saved.memory_fd))
            vmm = handle.spawn(config, descriptors, log_fd=log, saved=saved, uids=shape.uids)
        finally:
            for fd in (*descriptors, log):
                if fd >= 0:
                    os.close(fd)
        with self._lock:
            self._handle = vmm
            killed = self._killed
        self._journal.info(f"VMM {vmm.pid} started")
        threading.Thread(target=self._watch, args=(vmm,), name="vmm", daemon=True).start()
        if killed:
            raise HostError("it was killed while being created", code="aborted")
        return vmm

    def _watch(self, vmm: VmmHandle) -> None:
        end = vmm.wait_exit()
        self._journal.info(f"VMM {vmm.pid} ended: {end.reason}: {end.detail}")
        self.end = end
        self.ended.set()
        self._on_end()

    def _greet(self, vmm: VmmHandle, shape: GuestShape, deadline: float) -> HelloResponse:
        if shape.saved is not None:
            self._wake = _new_identity(shape, shape.saved.manifest)
            vmm.resume()
        self._agent = TtrpcClient(
            vmm.accept_vsock(CONTROL_PORT),
            "the guest's agent",
            self._agent_lost,
            max_data_bytes=_ANSWER_BYTES,
            max_items=_ANSWER_ITEMS,
        )
        hello = self.call("Hello", HelloRequest(), HelloResponse, deadline - time.monotonic())
        if shape.saved is not None:
            return hello
        request = _configuration(shape)
        request.unix_time_ns = time.time_ns()
        request.entropy = os.urandom(_ENTROPY_BYTES)
        self.call("ConfigureGuest", request, Empty, deadline - time.monotonic())
        return hello

    def _agent_lost(self) -> None:
        """A guest whose agent hung up, or sent what is no ttrpc, is no use and not trusted."""
        if not self._stopping and not self.ended.wait(1.0):
            self._journal.error("the agent's connection ended while the microVM runs; killing it")
            self.kill()


def _configuration(shape: GuestShape) -> ConfigureGuestRequest:
    return ConfigureGuestRequest(
        hostname=shape.hostname,
        interfaces=[port.interface for port in shape.nets],
        sysctls=shape.sysctls,
    )


def _new_identity(shape: GuestShape, manifest: Manifest) -> ResumeGuestRequest:
    """How a guest that was saved as somebody becomes somebody else."""
    guest = _configuration(shape)
    for interface, mac in zip(guest.interfaces, manifest.macs, strict=True):
        interface.present_mac = mac
    return ResumeGuestRequest(guest=guest, machine_id=os.urandom(_MACHINE_ID_BYTES))


def _boot_error(shape: GuestShape, error: VmcellError, end: VmmExit | None) -> HostError:
    text = f"cannot start the microVM: {error}"
    if end is not None:
        text += f"; the VMM ended with {end.reason}: {end.detail}"
    lines = _last_lines(shape.console_log)
    if lines:
        text += "; console: " + " | ".join(lines)
    return HostError(text, code=error.code)


def _last_lines(console_log: str) -> list[str]:
    """The console's last lines, printable only: they come from the guest."""
    try:
        with open(console_log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2048))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
    return [line for line in lines if line][-_CONSOLE_LINES:]
