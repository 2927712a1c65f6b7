"""Every build of this node: waiting, running, ended, and what an earlier noded left.

Builds wait for one of a few places. The thread that runs one owns its sandbox; what is known of a
build is in its record's folder, so a noded that starts anew says of the builds it finds unfinished
that they failed, and removes their sandboxes.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.node.build import SandboxRequest
from vmcell_api.node.build_images import BUILD, BuildImages
from vmcell_api.node.build_records import (
    BUILDING,
    ERROR,
    READY,
    WAITING,
    BuildRecord,
    BuildResult,
    LogEntry,
    unfinished,
)
from vmcell_api.node.build_run import (
    BuildRequest,
    BuildRun,
    Machines,
    Outcome,
    StepFailed,
    check_request,
)
from vmcell_api.node.build_steps import BASE, FINALIZE
from vmcell_api.node.guest_process import GuestProcesses
from vmcell_api.node.image_pull import full_reference
from vmcell_api.node.node import Node
from vmcell_api.node.upload_files import Upload, open_upload
from vmcell_protos.errors import CallerError, HostError, VmcellError

log = logging.getLogger("vmcell.noded")

BUILDER_INIT = "envd-builder"
STOP_TIMEOUT_S = 20.0
MAX_LIVE = 200


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What is the same for every build; the upload folder's files belong to `upload_uid`."""

    build_dir: str
    upload_dir: str
    upload_uid: int
    places: int
    timeout_s: int
    layer_limit_mib: int


@dataclass(frozen=True, kw_only=True)
class BuildView:
    """A build as the API sees it."""

    build_id: str
    status: str
    entries: list[LogEntry]
    result: BuildResult | None = None
    reason_entries: list[LogEntry] = field(default_factory=list)


class NodeMachines:
    """The one sandbox of a build, an ordinary one of the node's with another init."""

    def __init__(self, node: Node, sandbox_id: str, timeout_s: int) -> None:
        self._node = node
        self.sandbox_id = sandbox_id
        self._timeout_s = timeout_s

    def boot(self, request: BuildRequest, image: str) -> GuestProcesses:
        """Answers when envd has its token."""
        token = secrets.token_hex(32)
        sandbox = self._node.create(
            SandboxRequest(
                sandbox_id=self.sandbox_id,
                template_id=request.template_id,
                image=image,
                vcpus=request.vcpus,
                memory_mib=request.memory_mib,
                timeout_ms=self._timeout_s * 1000,
                access_token=token,
                default_user="root",
                init=BUILDER_INIT,
            )
        )
        return GuestProcesses(sandbox.address, token)

    def end(self) -> None:
        """Kills and removes it; one that has gone, or never was, is fine."""
        try:
            self._node.kill(self.sandbox_id)
        except CallerError as error:
            if error.code != "not_found":
                raise


@dataclass
class _Build:
    record: BuildRecord
    machines: Machines
    request: BuildRequest
    cancelled: threading.Event = field(default_factory=threading.Event)
    running: bool = False


class BuildService:
    """Thread-safe. `open()` after the node's, `close()` before it; both once."""

    def __init__(self, node: Node, images: BuildImages, settings: BuildSettings) -> None:
        self._node = node
        self._images = images
        self._settings = settings
        self._live: dict[str, _Build] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._pool = ThreadPoolExecutor(settings.places, thread_name_prefix="build")

    def open(self) -> None:
        """Settles what an earlier noded left unfinished."""
        self._images.drop_leases()
        for record in unfinished(self._settings.build_dir):
            log.info("build %s died with the noded before this one", record.build_id)
            self._machines(record.sandbox_id()).end()
            words = "the node was restarted while the template was built; build it again"
            record.log("error", words, BASE)
            record.end(BuildResult(status=ERROR, reason_message=words, reason_step=BASE))

    def close(self) -> None:
        """Cancels what runs, and waits for it: an end is written and no sandbox is left."""
        self._closing = True
        with self._lock:
            builds = list(self._live.values())
        for build in builds:
            self._cancel(build)
        for build in builds:
            self._wait_for_end(build.request.build_id)
        self._pool.shutdown(wait=True)

    # The verbs.

    def start(self, request: BuildRequest) -> BuildView:
        """Takes a build on; raises CallerError for one that cannot be, already_exists."""
        request = self._checked(request)
        record = self._record(request.build_id)
        machines = self._machines(new_sandbox_id())
        with self._lock:
            if len(self._live) >= MAX_LIVE:
                raise CallerError(
                    f"{MAX_LIVE} builds wait or run on this node; start this one later",
                    code="resource_exhausted",
                )
            if self._closing:
                raise HostError("noded is ending; start the build again in a moment")
            record.create(machines.sandbox_id)
            build = _Build(record=record, machines=machines, request=request)
            self._live[request.build_id] = build
        self._pool.submit(self._run, build)
        return BuildView(build_id=request.build_id, status=WAITING, entries=[])

    def get(self, build_id: str, offset: int, limit: int) -> BuildView:
        """A build with a page of its log; CallerError not_found."""
        record = self._record(build_id)
        with self._lock:
            build = self._live.get(build_id)
        # The end is read before the log: whoever is told of it then gets every line.
        ended = record.result()
        if ended is None and build is None:
            raise CallerError(f"build {build_id} was not found on this node", code="not_found")
        entries = record.entries(offset, limit)
        if ended is None:
            assert build is not None
            status = BUILDING if build.running else WAITING
            return BuildView(build_id=build_id, status=status, entries=entries)
        result, reason_entries = ended
        return BuildView(
            build_id=build_id,
            status=result.status,
            entries=entries,
            result=result,
            reason_entries=reason_entries,
        )

    def cancel(self, build_id: str) -> BuildView:
        """Ends a build early; one that has ended stays as it is."""
        with self._lock:
            build = self._live.get(build_id)
        if build is not None:
            self._cancel(build)
        return self.get(build_id, 0, 0)

    def remove(self, build_id: str) -> None:
        """Cancels a build and removes all of it; an unknown one is fine."""
        record = self._record(build_id)
        with self._lock:
            build = self._live.get(build_id)
        if build is not None:
            self._cancel(build)
            self._wait_for_end(build_id)
        self._node.forget_template(BUILD + build_id)
        self._images.forget(build_id)
        record.remove()

    # Inside.

    def _checked(self, request: BuildRequest) -> BuildRequest:
        check_request(request)
        if request.from_image.startswith("vmcell.local/build/"):
            return request  # of fromTemplate: the API has looked whose it is
        return replace(request, from_image=full_reference(request.from_image))

    def _record(self, build_id: str) -> BuildRecord:
        return BuildRecord(Path(self._settings.build_dir, build_id))

    def _machines(self, sandbox_id: str) -> NodeMachines:
        return NodeMachines(self._node, sandbox_id, self._settings.timeout_s)

    def _run(self, build: _Build) -> None:
        build.running = True
        build_id = build.request.build_id
        try:
            result = self._outcome(build)
            build.record.end(result)
            log.info("build %s: %s %s", build_id, result.status, result.reason_message[:200])
        except Exception:
            log.exception("build %s could not be ended", build_id)
        finally:
            with self._lock:
                self._live.pop(build_id, None)

    def _outcome(self, build: _Build) -> BuildResult:
        try:
            outcome = self._build_run(build).run()
        except StepFailed as error:
            build.record.log("error", str(error), error.step)
            return BuildResult(
                status=ERROR, reason_message=str(error)[:8000], reason_step=error.step
            )
        except VmcellError as error:
            return BuildResult(status=ERROR, reason_message=str(error), reason_step=BASE)
        except Exception:
            log.exception("build %s failed", build.request.build_id)
            words = "the build failed by a fault of the server; its log has the trace"
            return BuildResult(status=ERROR, reason_message=words, reason_step=BASE)
        self._prune()
        self._prepare(build, outcome)
        return BuildResult(
            status=READY,
            image=outcome.image,
            default_user=outcome.default_user,
            default_workdir=outcome.default_workdir,
        )

    def _prepare(self, build: _Build, outcome: Outcome) -> None:
        """Has the node save what creates of the template restore; without it they boot."""
        if not self._node.saves_templates:
            return
        request = build.request
        build.record.log("info", "saving the template when it is ready", FINALIZE)
        try:
            self._node.prepare_template(
                SandboxRequest(
                    sandbox_id=build.record.sandbox_id(),
                    template_id=request.template_id,
                    image=outcome.image,
                    vcpus=request.vcpus,
                    memory_mib=request.memory_mib,
                    timeout_ms=self._settings.timeout_s * 1000,
                    default_user=outcome.default_user,
                    default_workdir=outcome.default_workdir,
                    start_command=request.start_command,
                    ready_command=request.ready_command,
                )
            )
        except VmcellError as error:
            log.error("build %s: its template is not saved: %s", request.build_id, error)

    def _prune(self) -> None:
        try:
            self._images.prune()
        except VmcellError as error:  # costs disk until the next build, no more
            log.error("the cache of builds could not be pruned: %s", error)

    def _build_run(self, build: _Build) -> BuildRun:
        settings = self._settings
        return BuildRun(
            request=build.request,
            record=build.record,
            images=self._images,
            machines=build.machines,
            open_upload=self._open_upload,
            deadline=time.monotonic() + settings.timeout_s,
            layer_limit_bytes=settings.layer_limit_mib << 20,
            cancelled=build.cancelled,
        )

    def _open_upload(self, team_id: str, files_hash: str) -> Upload:
        settings = self._settings
        return open_upload(settings.upload_dir, team_id, files_hash, owner_uid=settings.upload_uid)

    def _cancel(self, build: _Build) -> None:
        """Whatever waits for the guest ends with it."""
        build.cancelled.set()
        build.machines.end()

    def _wait_for_end(self, build_id: str) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while True:
            with self._lock:
                build = self._live.get(build_id)
            if build is None:
                return
            if time.monotonic() > deadline:
                raise HostError(f"build {build_id} did not end within {STOP_TIMEOUT_S:.0f} s")
            # A boot that was under way when it was cancelled has a sandbox only now.
            build.machines.end()
            time.sleep(0.1)
