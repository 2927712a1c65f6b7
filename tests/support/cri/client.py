"""Pods and containers through CRI, in the shapes that tests want."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import grpc

from cri.streams import Streams, forward
from cri.stubs import compiled

CALL_S = 180.0


@dataclass(frozen=True)
class Pod:
    """A sandbox that runs; `config` is passed again with each container, as kubelet does."""

    id: str
    config: Any


class CriClient:
    """`target` as gRPC wants it. `stream_address` (host:port) stands in for the one in the URLs
    that CRI answers, "" where that can be reached as it is."""

    def __init__(self, target: str, *, handler: str, stream_address: str = "") -> None:
        self.messages, services = compiled()
        self._channel = grpc.insecure_channel(target)
        self._runtime = services.RuntimeServiceStub(self._channel)
        self._images = services.ImageServiceStub(self._channel)
        self.handler = handler
        self._stream_address = stream_address

    def __enter__(self) -> CriClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, method: str, *, timeout_s: float = CALL_S, **fields: Any) -> Any:
        """Any method by its name; raises grpc.RpcError."""
        stub = self._images if "Image" in method else self._runtime
        request = getattr(self.messages, f"{method}Request")(**fields)
        return getattr(stub, method)(request, timeout=timeout_s, wait_for_ready=True)

    def wait_ready(self, deadline_s: float = 120.0) -> None:
        """Returns once a daemon that is just starting answers."""

        def ready() -> bool:
            try:
                conditions = self.call("Status").status.conditions
            except grpc.RpcError:
                return False
            # 2.x has a third one, of deprecation warnings.
            ready = {row.type for row in conditions if row.status}
            return {"RuntimeReady", "NetworkReady"} <= ready

        wait_for(ready, bool, deadline_s)

    # ---- pods -----------------------------------------------------------------------------------

    def pod_config(
        self,
        name: str,
        *,
        log_directory: str,
        annotations: dict[str, str] | None = None,
        shared_pids: bool = False,
        memory_bytes: int = 0,
    ) -> Any:
        make = self.messages
        options = make.NamespaceOption(pid=make.POD if shared_pids else make.CONTAINER)
        linux = make.LinuxPodSandboxConfig(
            security_context=make.LinuxSandboxSecurityContext(namespace_options=options),
            resources=make.LinuxContainerResources(memory_limit_in_bytes=memory_bytes),
        )
        uid = str(uuid.uuid4())
        return make.PodSandboxConfig(
            metadata=make.PodSandboxMetadata(name=name, uid=uid, namespace="tests"),
            hostname=name,
            log_directory=log_directory,
            annotations=annotations or {},
            linux=linux,
        )

    def run_pod(self, config: Any) -> Pod:
        answer = self.call("RunPodSandbox", config=config, runtime_handler=self.handler)
        return Pod(answer.pod_sandbox_id, config)

    def pod_status(self, pod: Pod) -> Any:
        return self.call("PodSandboxStatus", pod_sandbox_id=pod.id).status

    def stop_pod(self, pod: Pod) -> None:
        self.call("StopPodSandbox", pod_sandbox_id=pod.id)

    def remove_pod(self, pod: Pod) -> None:
        self.call("RemovePodSandbox", pod_sandbox_id=pod.id)

    # ---- containers -----------------------------------------------------------------------------

    def create(
        self,
        pod: Pod,
        name: str,
        image: str,
        *command: str,
        mounts: tuple[tuple[str, str, bool], ...] = (),
        memory_bytes: int = 0,
        **fields: Any,
    ) -> str:
        """The id of a created container; `mounts`: (on the host, in the container, read-only)."""
        make = self.messages
        namespaces = pod.config.linux.security_context.namespace_options
        linux = make.LinuxContainerConfig(
            resources=make.LinuxContainerResources(memory_limit_in_bytes=memory_bytes),
            security_context=make.LinuxContainerSecurityContext(namespace_options=namespaces),
        )
        config = make.ContainerConfig(
            metadata=make.ContainerMetadata(name=name),
            image=make.ImageSpec(image=image),
            command=command,
            mounts=[
                make.Mount(host_path=outside, container_path=inside, readonly=read_only)
                for outside, inside, read_only in mounts
            ],
            log_path=f"{name}.log",
            linux=linux,
            **fields,
        )
        answer = self.call(
            "CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
        )
        return str(answer.container_id)

    def run(self, pod: Pod, name: str, image: str, *command: str, **fields: Any) -> str:
        """The id of a started container."""
        container = self.create(pod, name, image, *command, **fields)
        self.call("StartContainer", container_id=container)
        return container

    def stop(self, container: str, timeout_s: int) -> float:
        """Seconds that StopContainer took."""
        began = time.monotonic()
        self.call("StopContainer", container_id=container, timeout=timeout_s)
        return time.monotonic() - began

    def remove(self, container: str) -> None:
        self.call("RemoveContainer", container_id=container)

    def status(self, container: str) -> Any:
        return self.call("ContainerStatus", container_id=container).status

    def wait_exit(self, container: str, deadline_s: float = 120.0) -> Any:
        """The status once it has ended."""
        exited = self.messages.CONTAINER_EXITED
        return wait_for(lambda: self.status(container), lambda row: row.state == exited, deadline_s)

    def exec_sync(self, container: str, *command: str, timeout_s: int = 0) -> Any:
        return self.call("ExecSync", container_id=container, cmd=command, timeout=timeout_s)

    def shell(self, container: str, script: str) -> str:
        """The standard output of a script that has to succeed."""
        done = self.exec_sync(container, "sh", "-c", script)
        assert done.exit_code == 0, done
        return str(done.stdout.decode())

    def stats(self, container: str) -> Any:
        return self.call("ContainerStats", container_id=container).stats

    # ---- streams --------------------------------------------------------------------------------

    def exec(self, container: str, *command: str, tty: bool = False) -> Streams:
        answer = self.call(
            "Exec",
            container_id=container,
            cmd=command,
            tty=tty,
            stdin=True,
            stdout=True,
            stderr=not tty,
        )
        return Streams(self._reachable(answer.url))

    def attach(self, container: str, *, tty: bool = False) -> Streams:
        answer = self.call(
            "Attach", container_id=container, tty=tty, stdin=True, stdout=True, stderr=not tty
        )
        return Streams(self._reachable(answer.url))

    def port_forward(self, pod: Pod, port: int, data: bytes) -> bytes:
        """What `port` of the pod answers to `data`, to the end."""
        answer = self.call("PortForward", pod_sandbox_id=pod.id, port=[port])
        return forward(self._reachable(answer.url), port, data)

    def _reachable(self, url: str) -> str:
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=self._stream_address or parts.netloc, scheme="ws"))


def wait_for(
    look: Callable[[], Any], is_it: Callable[[Any], bool], deadline_s: float, pause_s: float = 0.2
) -> Any:
    """Looks until what is seen satisfies `is_it`: CRI has no call that waits."""
    end = time.monotonic() + deadline_s
    while not is_it(seen := look()):
        assert time.monotonic() < end, f"after {deadline_s} s there is still {seen}"
        time.sleep(pause_s)
    return seen
