"""Which service answers a call: containerd's Task v2 and v3, and the sandbox API."""

from __future__ import annotations

from vmcell_protos.errors import CallerError
from vmcell_shim import sandbox_service, service
from vmcell_shim.sandbox_service import SandboxService
from vmcell_shim.service import TaskService

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_shim.registry import Registry


class Dispatch:
    """The services of one shim process; `idle` runs when a shutdown found nothing left."""

    def __init__(self, registry: Registry, idle: Callable[[], None]) -> None:
        self._tasks = TaskService(registry, idle)
        self._sandboxes = SandboxService(registry, idle)

    def handle(self, name: str, method: str, payload: bytes, timeout_ns: int) -> bytes:
        """One call: bytes of the answer. Raises VmcellError."""
        if name in service.SERVICES:
            return self._tasks.handle(name, method, payload, timeout_ns)
        if name == sandbox_service.SERVICE:
            return self._sandboxes.handle(method, payload, timeout_ns)
        raise CallerError(f"service {name} is not offered", code="unimplemented")
