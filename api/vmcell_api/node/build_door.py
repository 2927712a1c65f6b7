"""The gRPC service of builds on noded's socket: what comes in is checked here."""

from __future__ import annotations

import re

from vmcell_api.node.build_records import LogEntry
from vmcell_api.node.build_run import BuildRequest
from vmcell_api.node.build_service import BuildService, BuildView
from vmcell_api.node.build_steps import Step
from vmcell_api.node.door import MAX_NAME_LENGTH, MAX_VCPUS, MEMORY_MIB, answering
from vmcell_api.node.image_pull import RegistryLogin
from vmcell_protos.errors import CallerError
from vmcell_protos.pb import node_pb2, node_pb2_grpc

MAX_PAGE = 1000
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class BuildDoor(node_pb2_grpc.BuildsServicer):
    """The servicer of `Builds` in `protos/node.proto`."""

    def __init__(self, builds: BuildService) -> None:
        self._builds = builds

    @answering
    def StartBuild(self, request: node_pb2.StartBuildRequest) -> node_pb2.BuildState:
        """Takes a build on."""
        return _message(self._builds.start(checked_build(request)))

    @answering
    def GetBuild(self, request: node_pb2.GetBuildRequest) -> node_pb2.BuildState:
        """A build with a page of its log."""
        limit = min(request.limit, MAX_PAGE)
        build_id = checked_uuid(request.build_id)
        return _message(self._builds.get(build_id, request.offset, limit))

    @answering
    def CancelBuild(self, request: node_pb2.BuildRef) -> node_pb2.BuildState:
        """Ends a build early."""
        return _message(self._builds.cancel(checked_uuid(request.build_id)))

    @answering
    def RemoveBuild(self, request: node_pb2.BuildRef) -> node_pb2.RemoveBuildResponse:
        """Removes all of a build."""
        self._builds.remove(checked_uuid(request.build_id))
        return node_pb2.RemoveBuildResponse()


def checked_build(request: node_pb2.StartBuildRequest) -> BuildRequest:
    """The request as the service takes it; raises CallerError for a value out of bounds."""
    if not 1 <= request.vcpus <= MAX_VCPUS or request.memory_mib not in MEMORY_MIB:
        raise CallerError(
            f"a build has 1 to {MAX_VCPUS} CPUs and {MEMORY_MIB[0]} to {MEMORY_MIB[-1]} MiB; "
            f"this one asks for {request.vcpus} and {request.memory_mib}"
        )
    for name in ("from_image", "template_id"):
        value = getattr(request, name)
        if not 0 < len(value) <= MAX_NAME_LENGTH or not value.isprintable():
            raise CallerError(f"{name} is {value[:80]!r}; give 1 to {MAX_NAME_LENGTH} characters")
    login = None
    if request.HasField("registry_login"):
        login = RegistryLogin(
            username=request.registry_login.username, password=request.registry_login.password
        )
    return BuildRequest(
        build_id=checked_uuid(request.build_id),
        team_id=checked_uuid(request.team_id),
        template_id=request.template_id,
        from_image=request.from_image,
        login=login,
        steps=tuple(
            Step(
                type=step.type,
                args=tuple(step.args),
                files_hash=step.files_hash,
                force=step.force,
            )
            for step in request.steps
        ),
        force=request.force,
        start_command=request.start_command,
        ready_command=request.ready_command,
        vcpus=request.vcpus,
        memory_mib=request.memory_mib,
    )


def checked_uuid(text: str) -> str:
    """A UUID in lower case; it becomes the name of a folder. Raises CallerError."""
    if not _UUID.fullmatch(text):
        raise CallerError(f"{text[:60]!r} is no UUID")
    return text


def _message(view: BuildView) -> node_pb2.BuildState:
    result = view.result
    return node_pb2.BuildState(
        build_id=view.build_id,
        status=view.status,
        entries=[_entry(entry) for entry in view.entries],
        reason_message=result.reason_message if result else "",
        reason_step=result.reason_step if result else "",
        reason_entries=[_entry(entry) for entry in view.reason_entries],
        image=result.image if result else "",
        default_user=result.default_user if result else "",
        default_workdir=result.default_workdir if result else "",
    )


def _entry(entry: LogEntry) -> node_pb2.BuildLogEntry:
    return node_pb2.BuildLogEntry(
        at_unix_ms=entry.at_unix_ms, level=entry.level, message=entry.message, step=entry.step
    )
