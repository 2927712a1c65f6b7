"""Runs inside the dev VM: a guest whose root is a list of layers as containerd 2.2 hands it over.

usage: layered_guest.py KERNEL BASE_IMAGE

Prints as JSON what the guest saw, and what it left in the file for writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agent_harness import (
    AgentClient,
    Running,
    container_spec,
    make_busybox_tree,
    make_erofs,
    process_spec,
)

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError
from vmcell_protos.task import Mount
from vmcell_runtime.config import BlkConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_runtime.handle import VmmHandle, spawn
from vmcell_shim.disk import open_disk
from vmcell_shim.rootfs import RootImages, parse_mounts, prepare_root
from vmcell_shim.shape import COMMAND_LINE, CONTROL_PORT, GUEST_CID, STREAM_PORT

BLOB_BYTES = 8 << 20
CALL_SECONDS = 120.0
SCRIPT = (
    "cat /etc/who; ls / /etc; cat /blob | wc -c; grep ^Cached: /proc/meminfo;"
    " echo kept > /written; rm /etc/group"
)


def make_layers(directory: Path) -> list[str]:
    """Three EROFS images, topmost first, none of them a multiple of 2 MiB."""
    make_busybox_tree(directory / "1")
    (directory / "1/blob").write_bytes(os.urandom(BLOB_BYTES))
    (directory / "1/etc/who").write_text("the first layer\n")
    (directory / "1/gone").write_text("from below\n")
    (directory / "2/etc").mkdir(parents=True)
    (directory / "2/etc/who").write_text("the second layer\n")
    (directory / "2/middle").write_text("from the middle\n")
    (directory / "3").mkdir()
    os.mknod(directory / "3/gone", 0o20600, os.makedev(0, 0))
    images = [make_erofs(directory / name, directory / f"{name}.erofs") for name in "321"]
    assert all(image.stat().st_size % (2 << 20) for image in images)
    return [str(image) for image in images]


def mount_list(layers: list[str], disk: Path) -> list[Mount]:
    made = [f"X-containerd.mkfs.size={64 << 20}", "X-containerd.mkfs.fs=ext4", "rw", "loop"]
    options = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        f"lowerdir={{{{ overlay 1 {len(layers)} }}}}",
    ]
    return [
        Mount(type="mkfs/ext4", source=str(disk), options=made),
        *(Mount(type="erofs", source=path, options=["ro", "loop"]) for path in layers),
        Mount(type="format/mkdir/overlay", source="overlay", options=options),
    ]


def boot(
    kernel: str, base_image: str, images: RootImages, directory: Path, stack: ExitStack
) -> VmmHandle:
    paths = (kernel, base_image, *images.lowers)
    descriptors = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
    descriptors.append(open_disk(images.disk))
    console = os.open(directory / "console.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    log = os.open(directory / "vmm.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    for fd in (*descriptors, console, log):
        stack.callback(os.close, fd)
    config = MachineConfig(
        vcpu_count=1,
        memory_mib=192,
        kernel_descriptor=0,
        command_line=COMMAND_LINE,
        console_descriptor=len(descriptors),
        pmem=tuple(PmemConfig(descriptor=1 + n) for n in range(1 + len(images.lowers))),
        blk=(BlkConfig(descriptor=len(descriptors) - 1),),
        vsock=VsockConfig(guest_cid=GUEST_CID, listen_ports=(CONTROL_PORT,)),
    )
    vmm = spawn(config, [*descriptors, console], log_fd=log)
    stack.callback(vmm.close)
    return vmm


def session(client: AgentClient, layers: int, found: dict[str, Any]) -> None:
    client.call("Hello", messages.HelloRequest())
    streams = messages.Streams(stdout=client.new_stream(), stderr=client.new_stream())
    root = messages.Rootfs(
        lower_devices=[f"pmem{number + 1}" for number in range(layers)], upper_device="vda"
    )
    spec = json.dumps(container_spec(process_spec("sh", "-c", SCRIPT))).encode()
    request = messages.CreateContainerRequest(
        container_id="layers", spec_json=spec, rootfs=root, streams=streams
    )
    client.call("CreateContainer", request)
    init = Running(client, "layers", "", streams).start()
    found["seen"] = init.read().decode().splitlines()
    found["errors"] = init.read("stderr").decode()
    found["status"] = init.wait()
    init.delete()


def inspect(disk: str, command: str) -> str:
    """What debugfs(8) says of the file for writes, as a commit would find it."""
    done = subprocess.run(["debugfs", "-R", command, disk], capture_output=True, check=True)
    return done.stdout.decode()


def main(kernel: str, base_image: str) -> None:
    """Boot, look around, write, shut down, print."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, ExitStack() as stack:
        directory = Path(name)
        (directory / "snapshot").mkdir()
        mounts = mount_list(make_layers(directory), directory / "snapshot/rwlayer.img")
        images = prepare_root(
            parse_mounts(mounts, "", False),
            cache_dir=str(directory / "cache"),
            own_dir=str(directory / "own"),
            writable_mib=64,
        )
        found["lowers"] = [os.path.basename(path) for path in images.lowers]
        try:
            vmm = boot(kernel, base_image, images, directory, stack)
            client = AgentClient(
                vmm.accept_vsock(CONTROL_PORT),
                lambda: vmm.connect_vsock(STREAM_PORT),
                CALL_SECONDS,
            )
            session(client, len(images.lowers), found)
            client.call("Shutdown", messages.Empty())
            found["ended"] = list(vmm.wait_exit(CALL_SECONDS))
            client.close()
            found["written"] = inspect(images.disk, "cat /upper/written")
            found["removed"] = inspect(images.disk, "stat /upper/etc/group")
        except (VmcellError, OSError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        found["console"] = (directory / "console.log").read_text(errors="replace")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
