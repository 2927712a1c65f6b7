"""A node's builds without a machine: each ends as the test says, after a line of log a step."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from vmcell_api.build_client import BuildEntry, NewBuild, NodeBuild
from vmcell_protos.errors import CallerError, VmcellError


class FakeBuilder:
    """`vmcell_api.build_client.BuildVerbs`. A RUN of `exit 3` fails; `hold` keeps builds going."""

    def __init__(self) -> None:
        self.orders: list[NewBuild] = []
        self.removed: list[str] = []
        self.hold = False
        self.fail_next: VmcellError | None = None
        self._builds: dict[str, NodeBuild] = {}
        self._lock = threading.Lock()

    def start(self, build: NewBuild) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        with self._lock:
            if build.build_id in self._builds:
                raise CallerError("exists", code="already_exists")
            self.orders.append(build)
            self._builds[build.build_id] = self._ended(build)

    def _ended(self, build: NewBuild) -> NodeBuild:
        entries = [_entry("info", f"FROM {build.from_image}", "base")]
        state = NodeBuild(
            build_id=build.build_id,
            status="ready",
            image=f"vmcell.local/build/{build.build_id}",
            default_user="user",
            default_workdir="/app",
        )
        for number, step in enumerate(build.steps, start=1):
            entries.append(_entry("info", f"{step.type} {' '.join(step.args)}", str(number)))
            if step.args[:1] == ["exit 3"]:
                entries.append(_entry("error", "it went wrong", str(number)))
                state = NodeBuild(
                    build_id=build.build_id,
                    status="error",
                    reason_message="failed to run command 'exit 3': exit status 3\nit went wrong",
                    reason_step=str(number),
                    reason_entries=entries[-1:],
                )
                break
        return replace(state, entries=entries)

    def get(self, build_id: str, *, offset: int, limit: int) -> NodeBuild:
        state = self._known(build_id)
        state = replace(state, entries=state.entries[offset : offset + limit])
        if self.hold and state.status != "error":
            return replace(state, status="building", image="")
        return state

    def cancel(self, build_id: str) -> NodeBuild:
        state = self._known(build_id)
        self._builds[build_id] = replace(
            state, status="error", reason_message="the build was cancelled"
        )
        return self._builds[build_id]

    def remove(self, build_id: str) -> None:
        self.removed.append(build_id)
        self._builds.pop(build_id, None)

    def forget_everything(self) -> None:
        """As a node whose disk was lost."""
        self._builds.clear()

    def _known(self, build_id: str) -> NodeBuild:
        if build_id not in self._builds:
            raise CallerError(f"build {build_id} was not found", code="not_found")
        return self._builds[build_id]


def _entry(level: str, message: str, step: str) -> BuildEntry:
    return BuildEntry(
        at_unix_ms=time.time_ns() // 1_000_000, level=level, message=message, step=step
    )
