"""Runs inside the dev VM: a guest with the real base image, driven as the shim would, said as JSON.

usage: guest_session.py KERNEL BASE_IMAGE

One boot for everything, because a boot is what costs; the tests judge what is printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import guest_pod
from agent_harness import (
    AgentClient,
    container_spec,
    create_container,
    declare_process,
    make_busybox_tree,
    make_erofs,
    process_spec,
    run,
)

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError
from vmcell_runtime.config import BlkConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import VmmHandle, spawn
from vmcell_shim.shape import COMMAND_LINE, CONTROL_PORT, GUEST_CID, STREAM_PORT

PMEM_STEP_BYTES = 2 << 20
STDIN_BYTES = 4 << 20
CONTAINER_MEMORY_BYTES = 48 << 20
CONTAINER_PIDS = 60
CALL_SECONDS = 120.0
BOMB = "bomb() { bomb | bomb & }; bomb; sleep 1000"
HOG = "dd if=/dev/zero of=/dev/null bs=100M count=1"


def limited_spec() -> dict[str, Any]:
    spec = container_spec(process_spec("sleep", "100000"))
    spec["linux"]["resources"] = {
        "memory": {"limit": CONTAINER_MEMORY_BYTES, "swap": CONTAINER_MEMORY_BYTES},
        "pids": {"limit": CONTAINER_PIDS},
        "cpu": {"quota": 90_000, "period": 100_000, "shares": 512},
    }
    return spec


@contextmanager
def guest(kernel: str, base_image: str, directory: Path) -> Iterator[VmmHandle]:
    """A guest that boots with busybox as pmem1 and an empty disk as vda."""
    make_busybox_tree(directory / "tree")
    image = make_erofs(directory / "tree", directory / "busybox.erofs")
    os.truncate(image, -(-image.stat().st_size // PMEM_STEP_BYTES) * PMEM_STEP_BYTES)
    disk = directory / "disk.ext4"
    disk.touch()
    os.truncate(disk, 128 << 20)
    run("mkfs.ext4", "-q", "-F", str(disk))
    config = MachineConfig(
        vcpu_count=1,
        memory_mib=192,
        kernel_descriptor=0,
        command_line=COMMAND_LINE,
        console_descriptor=4,
        pmem=(PmemConfig(descriptor=1), PmemConfig(descriptor=2)),
        blk=(BlkConfig(descriptor=3),),
        vsock=VsockConfig(guest_cid=GUEST_CID, listen_ports=(CONTROL_PORT,)),
    )
    with ExitStack() as stack:
        descriptors = []
        for path, flags in ((kernel, 0), (base_image, 0), (image, 0), (disk, os.O_RDWR)):
            descriptors.append(os.open(path, flags | os.O_CLOEXEC))
            stack.callback(os.close, descriptors[-1])
        log = stack.enter_context((directory / "vmm.log").open("wb"))
        console = stack.enter_context((directory / "console.log").open("wb"))
        vmm = spawn(config, [*descriptors, console.fileno()], log_fd=log.fileno())
        stack.callback(vmm.close)
        yield vmm


def limits(client: AgentClient, found: dict[str, Any]) -> None:
    """A fork bomb and a memory hog inside a container's limits, with the agent answering."""
    init = create_container(client, "limits", limited_spec()).start()
    bomb = declare_process(client, init, process_spec("sh", "-c", BOMB), "bomb").start()
    stats = messages.ContainerStatsResponse()
    end = time.monotonic() + CALL_SECONDS
    while stats.pids_current < CONTAINER_PIDS - 2 and time.monotonic() < end:
        payload = client.call("ContainerStats", messages.ContainerRef(container_id="limits"))
        stats = messages.ContainerStatsResponse.decode(payload)
    found["bomb_pids"] = [stats.pids_current, stats.pids_limit]
    bomb.signal(signal.SIGKILL, everyone=True)
    found["bombed_init"] = init.wait()
    bomb.close()
    init.delete()
    init = create_container(client, "limits", limited_spec()).start()
    hog = declare_process(client, init, process_spec("sh", "-c", HOG), "hog").start()
    found["hog"] = hog.wait()
    payload = client.call("ContainerStats", messages.ContainerRef(container_id="limits"))
    stats = messages.ContainerStatsResponse.decode(payload)
    found["oom_kill"] = stats.memory_events.get("oom_kill")
    found["memory_limit_bytes"] = stats.memory_limit_bytes
    after = declare_process(client, init, process_spec("echo", "alive"), "after").start()
    found["after_oom"] = [after.read().decode(), after.wait()]
    init.signal(signal.SIGKILL)
    init.wait()
    init.delete()


def session(client: AgentClient, found: dict[str, Any]) -> None:
    """What only a guest can show: its kernel, DAX, its own devices, vsock, clock, hostname."""
    client.call("Hello", messages.HelloRequest())
    clock_ns = 1_900_000_000_000_000_000
    configure = messages.ConfigureGuestRequest(
        unix_time_ns=clock_ns, hostname="cell", entropy=os.urandom(64)
    )
    client.call("ConfigureGuest", configure)
    script = "uname -r; hostname; date +%s; grep ^Cached: /proc/meminfo; wc -c; exit 7"
    spec = container_spec(process_spec("sh", "-c", script))
    del spec["hostname"]
    init = create_container(client, "plain", spec, stdin=True).start()
    data = os.urandom(STDIN_BYTES)

    def feed() -> None:
        init.sockets["stdin"].sendall(data)
        init.sockets["stdin"].shutdown(1)

    feeder = threading.Thread(target=feed)
    feeder.start()
    found["plain"] = init.read().decode().splitlines()
    feeder.join()
    found["plain_status"] = init.wait()
    init.delete()
    init = create_container(client, "echo", container_spec(process_spec("cat")), stdin=True)
    init.start()
    feeder = threading.Thread(target=feed)
    feeder.start()
    found["echo_whole"] = hashlib.sha256(init.read()).digest() == hashlib.sha256(data).digest()
    feeder.join()
    init.wait()
    init.delete()
    limits(client, found)


def pod(client: AgentClient, vmm: VmmHandle, found: dict[str, Any]) -> None:
    guest_pod.shared_things(client, lambda: vmm.connect_vsock(guest_pod.FORWARD_PORT), found)
    guest_pod.out_of_memory(client, found)
    guest_pod.new_limits(client, found)
    guest_pod.devices(client, found)


def main(kernel: str, base_image: str) -> None:
    """Boot, drive, shut down, print."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        try:
            with guest(kernel, base_image, directory) as vmm:
                client = AgentClient(
                    vmm.accept_vsock(CONTROL_PORT),
                    lambda: vmm.connect_vsock(STREAM_PORT),
                    CALL_SECONDS,
                )
                session(client, found)
                pod(client, vmm, found)
                client.call("Shutdown", messages.Empty())
                found["ended"] = list(vmm.wait_exit(CALL_SECONDS))
                client.close()
        except (VmcellError, OSError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        found["console"] = (directory / "console.log").read_text(errors="replace")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
