"""The limits of one container, changed while it runs."""

from __future__ import annotations

from vmcell_agent import resources
from vmcell_agent.jsonfields import parse_object
from vmcell_protos.errors import CallerError, VmcellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_agent.cgroup import Cgroup
    from vmcell_agent.errand import Errands
    from vmcell_agent.jsonfields import Object

# A lower memory limit is written while the kernel reclaims what is above it.
UPDATE_SECONDS = 10.0
# Files that read as what was written, unlike memory.reclaim, which `unified` may name.
_LASTING = {
    *("cpu.max", "cpu.weight", "cpuset.cpus", "cpuset.mems"),
    *("memory.low", "memory.max", "memory.swap.max", "pids.max"),
}


class Limits:
    """One change at a time; each is written in a child (see errand)."""

    def __init__(self, errands: Errands, cgroup: Cgroup, name: str) -> None:
        """`name` is for errors."""
        self._errands = errands
        self._cgroup = cgroup
        self.name = name
        self._changing = False

    def update(self, resources_json: bytes, answer: Callable[[VmcellError | None], None]) -> None:
        """Write what `linux.resources` names, in the order of Cgroup.update; raises CallerError."""
        if self._changing:
            raise CallerError(f"{self.name} is being updated", code="failed_precondition")
        wanted = parse_object(resources_json, "resources")
        files = resources.cgroup_files(wanted, self._cgroup.text)
        if wanted.object("memory").flag("checkBeforeUpdate"):
            self._check_usage(wanted.object("memory"))
        if self._holds(files):
            answer(None)
            return

        def work() -> bytes:
            self._cgroup.update(files)
            return b""

        def done(result: bytes | VmcellError) -> None:
            self._changing = False
            answer(result if isinstance(result, VmcellError) else None)

        what = f"update the limits of {self.name}"
        self._errands.run(what, work, done, seconds=UPDATE_SECONDS)
        self._changing = True

    def _holds(self, files: dict[str, str]) -> bool:
        """All is so already, as in a restored guest: a child would cost it memory for nothing."""
        lasting = all(name in _LASTING for name in files)
        return lasting and all(self._cgroup.text(name) == files[name] for name in files)

    def _check_usage(self, memory: Object) -> None:
        limit = memory.number("limit", -1, resources.LARGEST) or -1
        usage = self._cgroup.value("memory.current")
        if 0 < limit < usage:
            raise CallerError(
                f"{memory.path}.limit is {limit}, and {self.name} uses {usage} bytes",
                code="failed_precondition",
            )
