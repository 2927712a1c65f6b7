"""Which sandbox and which containers one shim process has; the table that its services share.

One shim serves one sandbox: that of a container without a pod, or a pod's with all its members.
"""

from __future__ import annotations

import os
import threading

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.bundle import GROUP_ANNOTATIONS
from vmcell_shim.config import load_config
from vmcell_shim.container import Container
from vmcell_shim.oci_json import read_object, take
from vmcell_shim.pause import PauseContainer
from vmcell_shim.sandbox import Sandbox
from vmcell_shim.sandbox_files import SandboxFiles

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.task import CreateTaskRequest
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.events import EventPublisher
    from vmcell_shim.journal import Journal

_KIND_ANNOTATION = "io.kubernetes.cri.container-type"


class Registry:
    """Owns the sandbox and the containers. Nothing waits while holding its lock."""

    def __init__(self, namespace: str, events: EventPublisher, journal: Journal) -> None:
        self._namespace = namespace
        self._events = events
        self.journal = journal
        self._lock = threading.Lock()
        self._containers: dict[str, Container] = {}
        self._sandbox: Sandbox | None = None
        self._sandbox_stays = False

    @property
    def in_use(self) -> bool:
        return bool(self._containers) or self._sandbox is not None

    def find(self, container_id: str) -> Container | None:
        with self._lock:
            return self._containers.get(container_id)

    def container(self, container_id: str) -> Container:
        """Raises CallerError(not_found)."""
        found = self.find(container_id)
        if found is None:
            raise CallerError(f"task {container_id} does not exist", code="not_found")
        return found

    def containers(self) -> list[Container]:
        with self._lock:
            return list(self._containers.values())

    def sandbox(self, sandbox_id: str) -> Sandbox:
        """The sandbox of the sandbox API; raises CallerError(not_found)."""
        with self._lock:
            if self._sandbox is None or self._sandbox.id != sandbox_id:
                raise CallerError(f"sandbox {sandbox_id} does not exist", code="not_found")
            return self._sandbox

    def open_sandbox(self, sandbox_id: str) -> Sandbox:
        """A pod's sandbox that stays until close_sandbox(), whatever its containers do.

        Raises CallerError(already_exists).
        """
        with self._lock:
            if self._sandbox is not None:
                raise CallerError(
                    f"this shim has the sandbox {self._sandbox.id} already", code="already_exists"
                )
            self._sandbox = self._new_sandbox(sandbox_id, sandbox_id, load_config(), is_pod=True)
            self._sandbox_stays = True
            return self._sandbox

    def close_sandbox(self, sandbox: Sandbox) -> None:
        """Ends and forgets a sandbox of open_sandbox(). Raises HostError."""
        sandbox.close()
        with self._lock:
            if self._sandbox is sandbox:
                self._sandbox, self._sandbox_stays = None, False

    def add(self, request: CreateTaskRequest) -> Container:
        """The container, not yet created, in the sandbox it belongs to; made where there is none.

        Raises CallerError: already_exists, or when it belongs to another sandbox.
        """
        config = load_config()
        spec = read_object(os.path.join(request.bundle, "config.json"))
        annotations = take(spec, "annotations", dict, {})
        groups = [annotations[name] for name in GROUP_ANNOTATIONS if annotations.get(name)]
        group = str(groups[0]) if groups else ""
        is_pause = annotations.get(_KIND_ANNOTATION) == "sandbox"
        with self._lock:
            if request.id in self._containers:
                raise CallerError(f"task {request.id} exists already", code="already_exists")
            sandbox = self._sandbox
            if sandbox is None:
                sandbox = self._sandbox = self._new_sandbox(
                    group or request.id,
                    request.id if is_pause or not group else f"@{group}",
                    config,
                    is_pod=bool(group),
                )
            elif not sandbox.is_pod or group != sandbox.id or is_pause:
                raise CallerError(
                    f"this shim's microVM is {sandbox.id}'s; {request.id} does not belong to it",
                    code="failed_precondition",
                )
            names = (self._namespace, request.id)
            alone = is_pause or not sandbox.is_pod
            files = sandbox.files if alone else SandboxFiles(os.path.join(config.state_dir, *names))
            kind = PauseContainer if is_pause else Container
            try:
                container = self._containers[request.id] = kind(
                    request,
                    sandbox=sandbox,
                    namespace=self._namespace,
                    config=config,
                    files=files,
                    own_dir=os.path.join(config.cache_dir, "sandboxes", *names),
                    events=self._events,
                    journal=self.journal,
                )
            except BaseException:
                if not self._containers and not self._sandbox_stays:
                    self._sandbox = None
                raise
            return container

    def remove(self, container: Container) -> None:
        """Forgets a container; the last one, or a pod's pause container, takes the sandbox along.

        Raises HostError.
        """
        with self._lock:
            self._containers.pop(container.id, None)
            sandbox = container.sandbox
            over = (
                sandbox is self._sandbox
                and not self._sandbox_stays
                and (not self._containers or isinstance(container, PauseContainer))
            )
            if over:
                self._sandbox = None
        if over:
            sandbox.close()

    def give_up(self, container: Container) -> None:
        """remove() after a failed creation, whose error is the one to be told."""
        try:
            self.remove(container)
        except HostError as error:
            self.journal.error(f"after the failed creation of {container.id}: {error}")

    def _new_sandbox(
        self, sandbox_id: str, directory: str, config: ShimConfig, *, is_pod: bool
    ) -> Sandbox:
        path = os.path.join(config.state_dir, self._namespace, directory)
        return Sandbox(
            sandbox_id,
            is_pod=is_pod,
            config=config,
            files=SandboxFiles(path),
            journal=self.journal,
            on_end=self._vm_ended,
        )

    def _vm_ended(self) -> None:
        for container in self.containers():
            container.vm_ended()
