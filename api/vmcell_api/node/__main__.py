"""noded: the process beside the shims that holds containerd's socket.

`python -m vmcell_api.node` runs it; `--teardown` removes the sandbox network and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from vmcell_api import logs
from vmcell_api.config import ApiConfig, load_config
from vmcell_api.node import build_service, door
from vmcell_api.node.build import BuildSettings, SandboxBuilder
from vmcell_api.node.build_door import BuildDoor
from vmcell_api.node.build_images import BuildImages
from vmcell_api.node.build_service import BuildService
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.node import Node
from vmcell_api.node.slots import SlotPool
from vmcell_api.node.snapshot_records import SnapshotRecords
from vmcell_api.node.volume_use import VolumeUse
from vmcell_api.node.zygote import ZygoteKeeper, find_program
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_protos.errors import HostError, VmcellError
from vmcell_protos.zygote import SOCKET_PATH, SOCKET_VARIABLE

log = logging.getLogger("vmcell.noded")

CONTAINERD_PATIENCE_S = 30
GRACE_S = 10


def build_node(config: ApiConfig) -> Node:
    """The node that `config` describes, not opened yet."""
    containerd = Containerd(
        config.containerd_socket,
        namespace=config.containerd_namespace,
        snapshotter=config.snapshotter,
    )
    volumes = VolumeFolders(config.volumes_dir)
    settings = BuildSettings(
        volumes=volumes,
        runtime=config.runtime,
        state_dir=config.state_dir,
        nameservers=config.nameservers,
        start_timeout_s=config.start_timeout_s,
    )
    slots = SlotPool(
        network=config.slot_network,
        slot_count=config.slot_count,
        nameservers=config.nameservers,
    )
    return Node(
        containerd,
        slots,
        SandboxBuilder(containerd, settings),
        config.state_dir,
        VolumeUse(volumes),
        SnapshotRecords(containerd, config.snapshot_dir),
        metrics_interval_s=config.metrics_interval_s,
        template_snapshots=config.template_snapshots,
        pool_sizes=config.pool_sizes,
    )


def build_builds(config: ApiConfig, node: Node) -> BuildService:
    """The builds of that node, not opened yet."""
    images = BuildImages(
        node.containerd, config.containerd_socket, cache_limit=config.build_cache_limit
    )
    settings = build_service.BuildSettings(
        build_dir=config.build_dir,
        upload_dir=config.upload_dir,
        upload_uid=config.api_uid if os.geteuid() == 0 else os.geteuid(),
        places=config.build_places,
        timeout_s=config.build_timeout_s,
        layer_limit_mib=config.disk_mib,
    )
    return BuildService(node, images, settings)


def wait_for_containerd(containerd: Containerd, socket_path: str) -> None:
    """Returns when containerd answers; raises HostError after 30 s."""
    deadline = time.monotonic() + CONTAINERD_PATIENCE_S
    while True:
        try:
            log.info("containerd %s on %s", containerd.version(), socket_path)
            return
        except HostError as error:
            if time.monotonic() > deadline:
                raise HostError(
                    f"containerd did not answer on {socket_path} within {CONTAINERD_PATIENCE_S} s: "
                    f"{error}; start containerd"
                ) from error
            time.sleep(0.2)


def keep_zygote(config: ApiConfig) -> Callable[[], None]:
    """Sees to a zygote for our own runtime from now on; what ends that."""
    path = os.environ.get(SOCKET_VARIABLE, SOCKET_PATH)
    if not path or not config.runtime.endswith(".vmcell.v2"):
        return lambda: None
    try:
        return ZygoteKeeper(find_program(), path).stop
    except HostError as error:
        log.warning("no zygote, starts are slower: %s", error)
        return lambda: None


def run(config: ApiConfig) -> None:
    """Serves until SIGTERM or SIGINT; sandboxes go on without noded."""
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    os.umask(0o022)  # others pass through the sockets' folder, and guests read the files
    with contextlib.ExitStack() as stack:
        stack.enter_context(door.only_one(config.node_socket))
        node = build_node(config)
        stack.callback(node.close)
        wait_for_containerd(node.containerd, config.containerd_socket)
        node.open()
        builds = build_builds(config, node)
        builds.open()
        stack.callback(builds.close)
        stack.callback(keep_zygote(config))
        server = door.serve(
            door.Door(node, disk_mib=config.disk_mib),
            config.node_socket,
            owner_uid=config.api_uid,
            builds=BuildDoor(builds),
        )
        log.info("noded listens on %s, %d slots", config.node_socket, config.slot_count)
        ending.wait()
        server.stop(GRACE_S).wait()


def serve(config: ApiConfig) -> int:
    """`run` with a log on standard error; answers the exit status."""
    logs.set_up("noded", config.log_format)
    try:
        run(config)
    except VmcellError as error:
        log.error("%s", error)
        return 1
    return 0


def main() -> int:
    """The command; answers its exit status."""
    logs.set_up("noded", "text")
    try:
        config = load_config()
        if not sys.argv[1:]:
            return serve(config)
        if sys.argv[1:] != ["--teardown"]:
            log.error("unknown arguments %s; the only one is --teardown", sys.argv[1:])
            return 2
        SlotPool(network=config.slot_network, slot_count=config.slot_count).close_all()
    except VmcellError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
