"""The VMM process: one message in, a machine, one message out.

Its ends, in the order of what counts:
- the guest ended: Exited with the reason, exit code 0;
- the machine could not be made: Failed with the error, exit code 1;
- anything unexpected, in any thread: Exited with vmm_error at once, exit code 70;
- its shim's socket closed: nobody to tell, exit code 0.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import NoReturn

from vmcell_protos.errors import VmcellError
from vmcell_runtime import answers
from vmcell_runtime.build import Descriptors, boot, restore
from vmcell_runtime.config import MAX_DESCRIPTORS, MAX_LISTEN_PORTS, MachineConfig
from vmcell_runtime.control import (
    MAX_MESSAGE_BYTES,
    Boot,
    Event,
    Exited,
    Restore,
    Running,
    cut,
    decode_request,
    encode,
    failed,
)
from vmcell_runtime.devices.console import LOG_LIMIT_BYTES
from vmcell_runtime.frame import Frame
from vmcell_runtime.jail import Bounds, EmptyRoot, enter, seal
from vmcell_runtime.loading import Saved
from vmcell_runtime.loop import HANGUP, READABLE
from vmcell_runtime.machine import Machine
from vmcell_runtime.page_map import open_page_map
from vmcell_runtime.size import Size, size_of
from vmcell_runtime.snapshot.state import MAX_STATE_BYTES, decode
from vmcell_runtime.vcpu import prepare_kicks

# Of each thread. Less than a huge page, which a kernel that gives them unasked would else put under
# the first byte of a stack.
STACK_BYTES = 1 << 20
EXIT_FAILED = 1
EXIT_UNEXPECTED = 70  # EX_SOFTWARE
_SAVED_FDS = 2  # memory and state, of a machine that is restored
_MAX_FDS = MAX_DESCRIPTORS + MAX_LISTEN_PORTS + _SAVED_FDS + 2  # and /dev/kvm, and the uid's


def main(shim_fd: int) -> NoReturn:
    """Serves the shim at the other end of `shim_fd` until the machine's end; never returns.

    The order of what follows is `vmcell_runtime.jail`'s.
    """
    close_others(shim_fd)
    shim = socket.socket(fileno=shim_fd)
    end_process_on_surprise(shim)
    prepare_process()
    serve(shim, None, None)


def prepare_process() -> None:
    """What the process is for its whole life. Errors are raised by `serve`."""
    prepare_kicks()
    threading.stack_size(STACK_BYTES)


def serve(shim: socket.socket, ready: Frame | None, empty_root: EmptyRoot | None) -> NoReturn:
    """`ready` was made before the machine was known, and is used if it is of its size; the process
    has left the host's namespaces then. `empty_root` is what the zygote has made for all its VMMs;
    closed here."""
    try:
        machine = _make(shim, ready, empty_root)
        if machine is not None:
            machine.start_threads()
            seal()
    except VmcellError as error:
        _log(f"start failed: {error}")
        _send(shim, failed(error))
        os._exit(EXIT_FAILED)
    if machine is None:
        os._exit(0)
    on_shim = partial(_on_shim, shim, machine)
    machine.loop.add(shim.fileno(), on_shim, READABLE | HANGUP, urgent=True)
    gc.collect()
    gc.freeze()
    _end_without(shim)
    _send(shim, Running())
    end = machine.run()
    counts = " ".join(f"{name}={count}" for name, count in machine.statistics().items())
    _log(f"ended: {end.reason}: {end.detail} ({counts})")
    machine.loop.remove(shim.fileno())
    machine.close()
    _send(shim, Exited(reason=end.reason, detail=cut(end.detail)))
    os._exit(0)  # all is closed and flushed; the interpreter's own end would only take time


def close_others(*kept: int) -> None:
    """Closes every descriptor but these and the first three."""
    low = 3
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _make(shim: socket.socket, ready: Frame | None, empty_root: EmptyRoot | None) -> Machine | None:
    """None if the shim went away before it asked for anything. This process is jailed then."""
    # One that is ready has its own already.
    page_map_fd = open_page_map() if ready is None else ready.page_map_fd
    datagram, fds, _, _ = socket.recv_fds(shim, MAX_MESSAGE_BYTES + 1, _MAX_FDS)
    if not datagram:
        return None
    request = decode_request(datagram)
    if not isinstance(request, Boot | Restore):
        raise ValueError(f"the shim's first message is {request.kind}, not boot or restore")
    config = request.config
    ports = config.vsock.listen_ports if config.vsock is not None else ()
    if request.uid:
        os.set_inheritable(fds.pop(), False)  # stays open: it is what holds the uid
    last = [fds.pop()] if fds else []
    if isinstance(request, Restore):
        last = fds[-_SAVED_FDS:] + last
        del fds[-_SAVED_FDS:]
    count = len(fds) - len(ports)
    if count < 0:
        raise ValueError(f"too few descriptors came with the {request.kind} message")
    for fd in (*fds, *last):
        os.set_inheritable(fd, False)
    config.check_descriptors(count)
    listeners = [socket.socket(fileno=fd) for fd in fds[count:]]
    descriptors = Descriptors(fds[:count])
    *saved_fds, kvm_fd = last
    bounds = _bounds(config, fds)
    if not enter(request.uid, bounds, empty_root, has_left=ready is not None):
        _log("not started by root: in no uid, namespaces and root directory of its own")
    report = Reports()
    try:
        saved = None
        if isinstance(request, Restore):
            memory_fd, state_fd = saved_fds
            saved = Saved(decode(read_state(state_fd)), memory_fd)
        frame = _frame(size_of(config, fds), kvm_fd, page_map_fd, ready)
        if saved is None:
            return boot(config, descriptors, frame, listeners, report)
        return restore(config, descriptors, frame, listeners, report, saved)
    finally:
        descriptors.close()
        for fd in saved_fds:
            os.close(fd)


def _bounds(config: MachineConfig, fds: Sequence[int]) -> Bounds:
    ram_bytes = config.memory_mib << 20
    if config.spare_windows:
        return Bounds(ram_bytes, None)
    disks = [os.fstat(fds[disk.descriptor]).st_size for disk in config.blk if not disk.read_only]
    return Bounds(ram_bytes, max(disks, default=0))


def _frame(size: Size, kvm_fd: int, page_map_fd: int, ready: Frame | None) -> Frame:
    if ready is None:
        return Frame(size, kvm_fd, page_map_fd)
    if ready.size == size:
        os.close(kvm_fd)
        return ready
    ready.close()
    return Frame(size, kvm_fd, page_map_fd)


def read_state(fd: int) -> bytes:
    """The whole file, wherever it was last read, or just more than a state may have."""
    found = b""
    while len(found) <= MAX_STATE_BYTES and (more := os.pread(fd, MAX_STATE_BYTES, len(found))):
        found += more
    return found


def _end_without(shim: socket.socket) -> None:
    """Ends the process if the shim has given it up, which it may since it has asked."""
    poll = select.poll()
    poll.register(shim, 0)
    if poll.poll(0):
        os._exit(0)


def _on_shim(shim: socket.socket, machine: Machine, _events: int) -> None:
    try:
        datagram, fds, _, _ = socket.recv_fds(shim, MAX_MESSAGE_BYTES + 1, answers.MAX_DESCRIPTORS)
    except ConnectionResetError:  # it went with a message of ours unread
        datagram, fds = b"", []
    if not datagram:
        # Nobody is left to tell and nobody will come: the kernel takes back the rest.
        os._exit(0)
    for fd in fds:
        os.set_inheritable(fd, False)
    answers.serve(machine, decode_request(datagram), fds, partial(_send, shim))


def _send(shim: socket.socket, event: Event) -> None:
    try:
        shim.send(encode(event))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # as on its end of file


def end_process_on_surprise(shim: socket.socket) -> None:
    """From here on an exception nobody caught, in any thread, is vmm_error and the end."""

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        detail = cut(f"{kind.__name__}: {error}")
        try:
            sys.__excepthook__(kind, error, trace)
            sys.stderr.flush()
        finally:
            try:
                shim.send(encode(Exited(reason="vmm_error", detail=detail)), socket.MSG_DONTWAIT)
            finally:
                os._exit(EXIT_UNEXPECTED)

    def end_thread(args: threading.ExceptHookArgs) -> None:
        end(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)

    sys.excepthook = end
    threading.excepthook = end_thread


class Reports:
    """Lines about what a guest did wrong, 1 MiB of them: one may go on with it all day."""

    def __init__(self, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
        self._room_bytes = limit_bytes

    def __call__(self, line: str) -> None:
        if self._room_bytes > 0:
            self._room_bytes -= len(line)
            _log(line if self._room_bytes > 0 else f"{line} (the last report: there are too many)")


def _log(line: str) -> None:
    # What a full disk does not take is lost; the guest is not to suffer for it.
    with suppress(OSError):
        os.write(2, f"vmm {os.getpid()}: {line}\n".encode(errors="replace"))
