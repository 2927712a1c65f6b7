"""Part of a guest session: what a pod needs of the guest's own kernel, said as JSON values."""

from __future__ import annotations

import json
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from agent_harness import AgentClient, Running, container_spec, declare_process, process_spec

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError

FORWARD_PORT = 1026
# in guest_session's machine: the base image, the image, the disk, vsock
PMEM_WINDOW, BLK_WINDOW, VSOCK_WINDOW = 1, 2, 3
SHARED = ["ipc", "uts", "pid"]
HOG = "dd if=/dev/zero of=/dev/null bs=100M count=1"
LIMITS = "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.max cpu.weight cpuset.cpus"


def pod_spec(script: str, **resources: Any) -> dict[str, Any]:
    spec = container_spec(process_spec("sh", "-c", script))
    spec["mounts"] = [row for row in spec["mounts"] if row["destination"] != "/dev/shm"]
    spec["mounts"] += [
        {"destination": "/dev/shm", "type": "vmcell-shm", "options": ["nosuid", "size=1m"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]},
    ]
    spec["linux"]["resources"] = resources
    spec["hostname"] = "pod"
    return spec


def member(
    client: AgentClient, name: str, script: str, files: Any = None, **resources: Any
) -> Running:
    """A started container of the pod on the image alone."""
    streams = messages.Streams(stdout=client.new_stream(), stderr=client.new_stream())
    client.call(
        "CreateContainer",
        messages.CreateContainerRequest(
            container_id=name,
            spec_json=json.dumps(pod_spec(script, **resources)).encode(),
            rootfs=messages.Rootfs(lower_devices=["pmem1"]),
            streams=streams,
            files=files,
            shared_namespaces=SHARED,
        ),
    )
    return Running(client, name, "", streams).start()


def told(client: AgentClient, init: Running, script: str) -> str:
    look = declare_process(client, init, process_spec("sh", "-c", script), "look").start()
    text = look.read().decode()
    look.wait()
    look.delete()
    look.close()
    return text


def end(*inits: Running) -> None:
    for init in inits:
        init.signal(signal.SIGKILL)
        init.wait()
        init.delete()
        init.close()


def shared_things(
    client: AgentClient, forward: Callable[[], socket.socket], found: dict[str, Any]
) -> None:
    """Namespaces, shared memory, a port forward, a file renewed, a freeze."""
    file = messages.FileCopy(destination="/etc/fixed", mode=0o644, content=b"1\n", read_only=True)
    serve = "mkdir /run/w; echo served >/run/w/x; httpd -p 8080 -h /run/w; echo up; sleep 10000"
    first = member(client, "first", serve, [file])
    first.read_until(b"up\n")
    second = member(client, "second", "trap 'exit 9' TERM; echo up; while :; do sleep 1; done")
    second.read_until(b"up\n")
    told(client, first, "echo word >/dev/shm/a")
    look = "hostname; cat /dev/shm/a; ps -o comm | grep -c sleep; ps -o pid,comm | grep pause"
    look += "; wget -qO- http://127.0.0.1:8080/x"
    found["pod"] = told(client, second, look).split()
    connection = forward()
    connection.sendall(struct.pack("<H", 8080) + b"GET /x HTTP/1.0\r\n\r\n")
    connection.settimeout(60)
    answer = b""
    while part := connection.recv(4096):
        answer += part
    connection.close()
    found["forwarded"] = answer.decode().split("\r\n\r\n")[-1]
    file.content = b"2\n"
    client.call("CopyFiles", messages.CopyFilesRequest(container_id="first", files=[file]))
    found["renewed"] = told(client, first, "cat /etc/fixed; echo 3 >/etc/fixed || echo ro").split()
    ref = messages.ContainerRef(container_id="second")
    client.call("FreezeContainer", ref)
    second.signal(signal.SIGTERM)
    waiting = client.begin("WaitProcess", second.ref)
    found["frozen"] = not client.answered(waiting, 1.0)
    second.signal(signal.SIGKILL)
    payload = client.finish(waiting)
    found["killed_frozen"] = messages.WaitProcessResponse.decode(payload).exit_status
    end(first)
    second.delete()


def devices(client: AgentClient, found: dict[str, Any]) -> None:
    """Drivers taken off windows and bound again, as if the VMM had just filled them."""
    found["attached"] = []
    init = member(client, "busy", "echo up; sleep 10000")
    init.read_until(b"up\n")
    for window, name in ((0, "its own root"), (PMEM_WINDOW, "busy"), (VSOCK_WINDOW, "no disk")):
        try:
            client.call("DetachDevice", messages.DetachDeviceRequest(window=window))
        except VmcellError as error:
            found[f"detach of {name}"] = f"{error.code}: {error}"
    end(init)
    for window in (PMEM_WINDOW, BLK_WINDOW):
        for _ in range(2):  # the second time there is no driver
            client.call("DetachDevice", messages.DetachDeviceRequest(window=window))
        request = messages.AttachDeviceRequest(window=window)
        start = time.monotonic()
        payload = client.call("AttachDevice", request)
        found["attached"].append(messages.AttachDeviceResponse.decode(payload).name)
        found["attach_seconds"] = time.monotonic() - start
        try:
            client.call("AttachDevice", request)
        except VmcellError as error:
            found["attached"].append(error.code)
    init = member(client, "after", "echo reborn")
    found["after_attach"] = init.read().decode()
    init.wait()
    init.delete()
    init.close()


def out_of_memory(client: AgentClient, found: dict[str, Any]) -> None:
    """The news of a kill comes while the container runs, and with the exit of its init."""
    memory = {"limit": 24 << 20}
    init = member(client, "hog", "echo up; sleep 10000", memory=memory)
    init.read_until(b"up\n")
    waiting = client.begin("WaitOom", messages.WaitOomRequest(container_id="hog"))
    found["no_oom_yet"] = not client.answered(waiting)
    second = client.begin("WaitOom", messages.WaitOomRequest(container_id="hog", seen=1))
    told(client, init, HOG)
    payload = client.finish(waiting)
    found["oom_told"] = messages.WaitOomResponse.decode(payload).oom_kills
    found["second_waits"] = not client.answered(second)
    end(init)
    try:
        client.finish(second)
    except VmcellError as error:
        found["second_end"] = error.code
    init = member(client, "init", f"exec {HOG}", memory=memory)
    payload = client.call("WaitProcess", init.ref)
    answer = messages.WaitProcessResponse.decode(payload)
    found["oom_exit"] = [answer.exit_status, answer.oom_kills]
    init.delete()
    init.close()


def new_limits(client: AgentClient, found: dict[str, Any]) -> None:
    """Limits changed by the kernel's own word, and a refusal that changes none."""
    init = member(
        client, "limits", "echo up; sleep 10000", memory={"limit": 64 << 20}, pids={"limit": 50}
    )
    init.read_until(b"up\n")

    def update(**resources: Any) -> str:
        request = messages.UpdateContainerRequest(
            container_id="limits", resources_json=json.dumps(resources).encode()
        )
        try:
            client.call("UpdateContainer", request)
        except VmcellError as error:
            return f"{error.code}: {error}"
        return ""

    update(
        memory={"limit": 32 << 20, "reservation": 8 << 20, "swap": 64 << 20},
        cpu={"quota": 50_000, "shares": 2048, "cpus": "0"},
    )
    found["limits"] = told(client, init, LIMITS).split()
    update(cpu={"period": 50_000})
    update(pids={"limit": -1})
    found["refused"] = update(memory={"limit": 16 << 20}, cpu={"shares": 4, "cpus": "0-77"})
    found["limits_after"] = told(client, init, LIMITS).split()
    start = time.monotonic()
    found["lowered"] = update(memory={"limit": 4096})
    found["lowered_seconds"] = time.monotonic() - start
    payload = client.call("WaitProcess", init.ref)
    answer = messages.WaitProcessResponse.decode(payload)
    found["lowered_end"] = [answer.exit_status, answer.oom_kills > 0]
    init.delete()
    init.close()
