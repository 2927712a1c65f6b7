"""PID 1 of the guest: prepare the machine, dial the host, serve, reset."""

from __future__ import annotations

import gc
import os
import socket

from vmcell_agent import abi, machine
from vmcell_agent.container import BUILDER
from vmcell_agent.guest import Places, Transports, serve
from vmcell_agent.log import KernelLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vmcell_agent.container import Builtin

CONTROL_PORT = 1024  # on the host
STREAM_PORT = 1025  # on the guest
FORWARD_PORT = 1026  # on the guest
_BACKLOG = 64


def _load_envd() -> Callable[[Callable[[], None]], NoReturn]:
    """Imported in the child alone: PID 1 itself never pays for it."""
    from vmcell_agent.envd.serve import run

    return lambda ready: run(ready=ready)


def _load_builder(upper: str) -> Callable[[Callable[[], None]], NoReturn]:
    """envd that gives away what was written; `upper` is the overlay's upper directory."""
    from vmcell_agent.envd.serve import run_builder

    descriptor = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return lambda ready: run_builder(descriptor, ready=ready)


BUILTINS: dict[str, Builtin] = {"envd": _load_envd, BUILDER: _load_builder}


def _from_the_host(address: object) -> bool:
    return isinstance(address, tuple) and address[0] == abi.VMADDR_CID_HOST


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(_BACKLOG)
    return listener


def _dial() -> socket.socket:
    """The host once more, without waiting for it; raises OSError."""
    control = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    control.setblocking(False)
    try:
        control.connect((abi.VMADDR_CID_HOST, CONTROL_PORT))
    except BlockingIOError:
        pass
    except OSError:
        control.close()
        raise
    return control


def main() -> None:
    """Never returns in a guest: the machine is reset at the end."""
    machine.prepare()
    log = KernelLog()
    streams, forwards = _listen(STREAM_PORT), _listen(FORWARD_PORT)
    control = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    control.connect((abi.VMADDR_CID_HOST, CONTROL_PORT))
    gc.freeze()  # what is loaded by now lives as long as the guest; forks need not copy it
    gc.enable()  # the init script turned it off for the imports
    places = Places(
        machine.CGROUP_ROOT,
        machine.STATE_DIRECTORY,
        machine.DEVICE_DIRECTORY,
        machine.SYSFS_DIRECTORY,
    )
    transports = Transports(control, _dial, streams, forwards, _from_the_host)
    serve(transports, places, BUILTINS, log.write)
    machine.reset()


if __name__ == "__main__":
    main()
