"""Devices that come after boot: the virtio-mmio window the VMM has filled, its driver, its name.

A spare window is a platform device without a driver. Writing its name to the driver's `bind` lets
the kernel look at it again; what appears below it in sysfs is a disk (`virtio3/block/vdb`) or,
in steps of its own, persistent memory (`virtio3/ndbus1/region1/namespace1.0/block/pmem1`).
Source: drivers/virtio/virtio_mmio.c, drivers/nvdimm of Linux 6.12; driver-api/driver-model/binding.

The driver's own work (reading a disk's first block, flushing, waiting for a device that does not
answer) happens in the process that writes, so that is never the agent but a child of it.
"""

from __future__ import annotations

import errno
import os
import re
import time

from vmcell_agent import abi
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError, HostError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.errand import Errands
    from vmcell_agent.eventloop import Loop

    Answer = Callable[[str | VmcellError], None]

MAX_WINDOW = 255
DRIVER_SECONDS = 10.0
APPEAR_SECONDS = 5.0
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.001, 0.032
# A mount namespace that is just ending holds its devices for a moment.
RELEASE_SECONDS = 1.0
_RELEASE_STEP_SECONDS = 0.02
_DISKS = (("virtio", "block", ""), ("virtio", "ndbus", "region", "namespace", "block", ""))
_DISK_NAME = re.compile(r"vd[a-z]{1,2}|pmem[0-9]{1,3}", re.ASCII)
_DISK_TYPES = (abi.VIRTIO_ID_BLOCK, abi.VIRTIO_ID_PMEM)


class Windows:
    """Binds and unbinds; knows no device, asks sysfs each time."""

    def __init__(
        self, loop: Loop, errands: Errands, sysfs_directory: str, device_directory: str
    ) -> None:
        self._loop = loop
        self._errands = errands
        self._platform = f"{sysfs_directory}/bus/platform"
        self._devices = device_directory
        self._busy: set[int] = set()

    def attach(self, window: int, answer: Answer) -> None:
        """Bind the driver; answers with the device's name once its node is there. Raises
        CallerError."""
        platform = self._check(window)
        if names := _disks(platform):
            raise CallerError(
                f"window {window} has its driver already: it is {', '.join(names)}",
                code="already_exists",
            )
        self._busy.add(window)

        def bound(result: bytes | VmcellError) -> None:
            if isinstance(result, VmcellError):
                self._busy.discard(window)
                answer(result)
            else:
                end = time.monotonic() + APPEAR_SECONDS
                self._look(window, answer, _FIRST_LOOK_SECONDS, end)

        try:
            self._errands.run(
                f"bind window {window}",
                lambda: _bind(self._platform, window),
                bound,
                seconds=DRIVER_SECONDS,
            )
        except VmcellError:
            self._busy.discard(window)
            raise

    def detach(self, window: int, answer: Callable[[VmcellError | None], None]) -> None:
        """Take the driver off a disk that nobody uses; a window without a driver is left as it is.
        Raises CallerError."""
        platform = self._check(window)
        self._busy.add(window)

        def done(result: bytes | VmcellError) -> None:
            self._busy.discard(window)
            answer(result if isinstance(result, VmcellError) else None)

        try:
            self._errands.run(
                f"detach window {window}",
                lambda: _release(self._platform, platform, self._devices, window),
                done,
                seconds=DRIVER_SECONDS,
            )
        except VmcellError:
            self._busy.discard(window)
            raise

    def _check(self, window: int) -> str:
        """The platform device's own directory."""
        platform = os.path.realpath(f"{self._platform}/devices/virtio-mmio.{window}")
        if window > MAX_WINDOW or not os.path.isdir(platform):
            raise CallerError(
                f"this guest has no virtio-mmio window {window}; spare ones are there from boot",
                code="not_found",
            )
        if window in self._busy:
            raise CallerError(
                f"window {window} is being attached or detached", code="failed_precondition"
            )
        return platform

    def _look(self, window: int, answer: Answer, seconds: float, end: float) -> None:
        """Look for the device's node, and again a little later until `end`."""
        platform = os.path.realpath(f"{self._platform}/devices/virtio-mmio.{window}")
        names = [name for name in _disks(platform) if _opens(f"{self._devices}/{name}")]
        if names:
            self._busy.discard(window)
            answer(names[0])
        elif time.monotonic() < end:
            next_seconds = min(seconds * 2, _LONGEST_LOOK_SECONDS)
            self._loop.call_later(seconds, lambda: self._look(window, answer, next_seconds, end))
        else:
            self._give_up(window, platform, answer)

    def _give_up(self, window: int, platform: str, answer: Answer) -> None:
        """No device: the window is left without a driver, as it was."""
        what = ", ".join(map(os.path.basename, _below(platform, "virtio"))) or "no virtio device"
        error = HostError(
            f"window {window}: no disk appeared within {APPEAR_SECONDS:g} s; there is {what}",
            code="deadline_exceeded",
        )

        def done(result: bytes | VmcellError) -> None:
            self._busy.discard(window)
            answer(error)

        try:
            self._errands.run(
                f"unbind window {window}",
                lambda: _write(f"{self._platform}/drivers/virtio-mmio/unbind", window),
                done,
                seconds=DRIVER_SECONDS,
            )
        except VmcellError as second:
            done(second)


def _below(directory: str, *prefixes: str) -> list[str]:
    """Paths below `directory`, a level for each prefix that the name there starts with."""
    paths = [directory]
    for prefix in prefixes:
        paths = [f"{path}/{name}" for path in paths for name in _names(path, prefix)]
    return paths


def _names(directory: str, prefix: str) -> list[str]:
    try:
        return [name for name in sorted(os.listdir(directory)) if name.startswith(prefix)]
    except OSError:  # no directory, or gone meanwhile
        return []


def _disks(platform: str) -> list[str]:
    """Names of the disks that a platform device has become; more than one never happens."""
    names = (os.path.basename(path) for prefixes in _DISKS for path in _below(platform, *prefixes))
    return [name for name in names if _DISK_NAME.fullmatch(name)]


def _opens(path: str) -> bool:
    """The node is there before the disk behind it is (ENXIO): pmem is bound in the background.

    One that does not open for another reason is told by the deadline.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _virtio_types(platform: str) -> list[int]:
    types = []
    for path in _below(platform, "virtio", "device"):
        with attempt(f"read {path}"), open(path) as file:
            types.append(int(file.read(16), 16))
    return types


def _write(path: str, window: int) -> bytes:
    with attempt(f"write virtio-mmio.{window} to {path}"):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, f"virtio-mmio.{window}".encode())
    return b""


def _bind(bus: str, window: int) -> bytes:
    """In a child."""
    try:
        return _write(f"{bus}/drivers/virtio-mmio/bind", window)
    except HostError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.ENODEV:
            raise CallerError(
                f"window {window} is empty: the VMM has plugged no device into it",
                code="failed_precondition",
            ) from error
        raise


def _release(bus: str, platform: str, devices: str, window: int) -> bytes:
    """In a child: a disk's exclusive open is refused while any file system, in any namespace, is
    mounted from it (open(2), O_EXCL)."""
    if not os.path.exists(f"{platform}/driver"):
        return b""
    for kind in _virtio_types(platform):
        if kind not in _DISK_TYPES:
            raise CallerError(
                f"window {window} holds a virtio device of type {kind}; only disks are detached",
                code="failed_precondition",
            )
    for name in _disks(platform):
        _claim(f"{devices}/{name}", window)
    return _write(f"{bus}/drivers/virtio-mmio/unbind", window)


def _claim(path: str, window: int) -> None:
    """Open it for this process alone, until the process ends."""
    end = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise HostError(f"open {path}: {error.strerror}", code="internal") from error
            if time.monotonic() >= end:
                name = os.path.basename(path)
                raise CallerError(
                    f"window {window} cannot be detached: {name} is mounted (EBUSY); "
                    "remove the container that uses it first",
                    code="failed_precondition",
                ) from error
        time.sleep(_RELEASE_STEP_SECONDS)
