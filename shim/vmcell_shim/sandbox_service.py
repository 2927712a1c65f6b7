"""containerd's sandbox API: a pod's microVM without a sandbox container (`sandboxer = "shim"`).

Used by containerd 2.x; the containers come as tasks with the sandbox's id in their annotations.
Source: containerd api/runtime/sandbox/v1, core/sandbox; reference: shim-contract 2.3.
"""

from __future__ import annotations

import threading
import time

from vmcell_protos import sandbox as messages
from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_protos.wellknown import Empty
from vmcell_shim.config import load_config
from vmcell_shim.events import timestamp
from vmcell_shim.metrics import metrics_of, sum_of
from vmcell_shim.pod_config import pod_files, pod_spec
from vmcell_shim.process import KILLED_STATUS
from vmcell_shim.sandbox import UP
from vmcell_shim.spec import plan_pod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.wire import Message
    from vmcell_shim.registry import Registry
    from vmcell_shim.sandbox import Sandbox

SERVICE = "containerd.runtime.sandbox.v1.Sandbox"
READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"


class _Pod:
    """What the API asks about a sandbox beside its VM: when it began and ended, and how."""

    def __init__(self, sandbox: Sandbox, request: messages.CreateSandboxRequest) -> None:
        self.sandbox = sandbox
        self.request = request
        self.created_at_ns = 0
        self.exited_at_ns = 0
        self.exit_status = 0
        self._lock = threading.Lock()

    def end(self, status: int) -> None:
        """Notes the end, the first time."""
        with self._lock:
            if not self.exited_at_ns:
                self.exited_at_ns, self.exit_status = time.time_ns(), status


class SandboxService:
    """At most one sandbox in a shim. `idle` runs when ShutdownSandbox found nothing left."""

    def __init__(self, registry: Registry, idle: Callable[[], None]) -> None:
        self._registry = registry
        self._idle = idle
        self._pod: _Pod | None = None
        self._methods: dict[str, Callable[[bytes, int], Message]] = {
            "CreateSandbox": self._create,
            "StartSandbox": self._start,
            "Platform": self._platform,
            "StopSandbox": self._stop,
            "WaitSandbox": self._wait,
            "SandboxStatus": self._status,
            "PingSandbox": self._ping,
            "ShutdownSandbox": self._shutdown,
            "SandboxMetrics": self._metrics,
        }

    def handle(self, method: str, payload: bytes, timeout_ns: int) -> bytes:
        """One call: bytes of the answer. Raises VmcellError."""
        function = self._methods.get(method)
        if function is None:
            raise CallerError(f"{SERVICE} has no method {method}", code="unimplemented")
        return function(payload, timeout_ns).encode()

    def _found(self, sandbox_id: str) -> _Pod:
        pod = self._pod
        if pod is None or pod.sandbox.id != sandbox_id:
            raise CallerError(f"sandbox {sandbox_id} does not exist", code="not_found")
        return pod

    def _create(self, payload: bytes, _: int) -> Message:
        request = messages.CreateSandboxRequest.decode(payload)
        sandbox = self._registry.open_sandbox(request.sandbox_id)
        try:
            sandbox.files.create(request.bundle_path)
        except HostError:
            self._registry.close_sandbox(sandbox)
            raise
        self._pod = _Pod(sandbox, request)
        return Empty()

    def _start(self, payload: bytes, timeout_ns: int) -> Message:
        pod = self._found(messages.StartSandboxRequest.decode(payload).sandbox_id)
        config = load_config()
        spec = pod_spec(pod.request)
        pod.sandbox.member_files = pod_files(pod.request)
        plan = plan_pod(
            spec,
            default_vcpus=config.default_vcpus,
            default_memory_mib=config.default_memory_mib,
        )
        timeout_s = min(timeout_ns / 1e9 if timeout_ns > 0 else float("inf"), config.boot_timeout_s)
        try:
            pod.sandbox.boot(
                plan, spec, pod.request.bundle_path, None, time.monotonic() + timeout_s
            )
        except BaseException:
            pod.end(KILLED_STATUS)
            self._registry.close_sandbox(pod.sandbox)
            raise
        pod.created_at_ns = time.time_ns()
        threading.Thread(target=self._watch, args=(pod,), name="pod", daemon=True).start()
        return messages.StartSandboxResponse(
            pid=pod.sandbox.guest.pid, created_at=timestamp(pod.created_at_ns)
        )

    def _watch(self, pod: _Pod) -> None:
        pod.sandbox.guest.ended.wait()
        pod.end(KILLED_STATUS)

    def _platform(self, payload: bytes, _: int) -> Message:
        messages.PlatformRequest.decode(payload)
        platform = messages.OperatingPlatform(os="linux", architecture="amd64")
        return messages.PlatformResponse(platform=platform)

    def _stop(self, payload: bytes, _: int) -> Message:
        pod = self._found(messages.StopSandboxRequest.decode(payload).sandbox_id)
        pod.end(0)
        pod.sandbox.guest.kill()
        return Empty()

    def _wait(self, payload: bytes, _: int) -> Message:
        pod = self._found(messages.WaitSandboxRequest.decode(payload).sandbox_id)
        pod.sandbox.guest.ended.wait()
        pod.end(KILLED_STATUS)
        return messages.WaitSandboxResponse(
            exit_status=pod.exit_status, exited_at=timestamp(pod.exited_at_ns)
        )

    def _status(self, payload: bytes, _: int) -> Message:
        request = messages.SandboxStatusRequest.decode(payload)
        pod = self._found(request.sandbox_id)
        guest = pod.sandbox.guest
        ready = pod.sandbox.state == UP and not guest.ended.is_set() and not pod.exited_at_ns
        info = {}
        if request.verbose:
            info = {
                "vmm_pid": str(guest.pid),
                "vcpus": str(pod.sandbox.vcpus),
                "memory_mib": str(pod.sandbox.memory_mib),
                "containers": ",".join(c.id for c in self._registry.containers()),
            }
        return messages.SandboxStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=guest.pid,
            state=READY if ready else NOT_READY,
            info=info,
            created_at=timestamp(pod.created_at_ns) if pod.created_at_ns else None,
            exited_at=timestamp(pod.exited_at_ns) if pod.exited_at_ns else None,
        )

    def _ping(self, payload: bytes, _: int) -> Message:
        self._found(messages.PingRequest.decode(payload).sandbox_id)
        return Empty()

    def _shutdown(self, payload: bytes, _: int) -> Message:
        pod = self._found(messages.ShutdownSandboxRequest.decode(payload).sandbox_id)
        pod.end(KILLED_STATUS)
        self._registry.close_sandbox(pod.sandbox)
        self._pod = None
        if not self._registry.in_use:
            self._idle()
        return Empty()

    def _metrics(self, payload: bytes, _: int) -> Message:
        """What its containers take together, by the guest's kernel."""
        request = messages.SandboxMetricsRequest.decode(payload)
        self._found(request.sandbox_id)
        rows = []
        for container in self._registry.containers():
            try:
                rows.append(container.stats())
            except VmcellError as error:
                # Not started, paused, ended: it takes nothing, or nothing new.
                if error.code not in ("failed_precondition", "not_found"):
                    raise
        metric = messages.Metric(
            timestamp=timestamp(time.time_ns()),
            id=request.sandbox_id,
            data=metrics_of(sum_of(rows)),
        )
        return messages.SandboxMetricsResponse(metrics=metric)
