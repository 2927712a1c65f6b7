"""The agent whole: everything wired to one loop, given its two transports and its places.

The transports come from outside (vsock in a guest, unix sockets in a test); what is served and how
it ends is the same.
"""

from __future__ import annotations

from contextlib import ExitStack

from vmcell_agent.container import Surroundings
from vmcell_agent.control import HostConnection
from vmcell_agent.errand import Errands
from vmcell_agent.eventloop import Loop
from vmcell_agent.pod import Pod
from vmcell_agent.portdoor import PortDoor
from vmcell_agent.reaper import Reaper
from vmcell_agent.record import Record
from vmcell_agent.service import AgentService
from vmcell_agent.spawn import Spawner
from vmcell_agent.streamdoor import StreamDoor

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmcell_agent.container import Builtin


class Places(Record):
    """Where the agent keeps things: a cgroup v2 directory, a state directory, device nodes,
    sysfs."""

    cgroup_root: str
    state_directory: str
    device_directory: str
    sysfs_directory: str


class Transports(Record):
    """The connected control stream, how another one is dialled (see control.Redial), the listeners
    for streams and for port forwards, and who may dial them."""

    control: socket.socket
    dial: Callable[[], socket.socket]
    stream_listener: socket.socket
    port_listener: socket.socket
    accepts_peer: Callable[[object], bool]


def serve(
    transports: Transports,
    places: Places,
    builtins: dict[str, Builtin],
    log: Callable[[str], None],
) -> None:
    """Serve until the host is gone or asks for shutdown; containers are gone when it returns. After
    a reset of the transport there is another host, and it is served."""
    with ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        reaper = Reaper(loop)
        stack.callback(reaper.close)
        door = StreamDoor(loop, transports.stream_listener, transports.accepts_peer)
        stack.callback(door.close)
        ports = PortDoor(loop, transports.port_listener, transports.accepts_peer)
        stack.callback(ports.close)
        spawner = Spawner()
        stack.callback(spawner.close)
        errands = Errands(loop, reaper)
        stack.callback(errands.close)
        pod = Pod(spawner, reaper, places.state_directory)
        stack.callback(pod.close)
        around = Surroundings(
            loop=loop,
            door=door,
            reaper=reaper,
            spawner=spawner,
            errands=errands,
            pod=pod,
            cgroup_root=places.cgroup_root,
            state_directory=places.state_directory,
            device_directory=places.device_directory,
            builtins=builtins,
            log=log,
        )
        service = AgentService(around, places.sysfs_directory, loop.stop)

        def lost(reason: str) -> None:
            log(f"{reason}; shutting down")
            loop.stop()

        def reset() -> None:
            log("the host has changed; dialling the new one")
            door.forget_host()
            ports.forget_host()
            service.forget_host()

        control = HostConnection(
            loop, transports.control, transports.dial, service.dispatch, reset=reset, lost=lost
        )
        stack.callback(control.close)
        stack.callback(service.close)
        loop.run()
