"""The API's side of noded's builds.

`BuildVerbs` is what the rest of the API knows of them; `BuildClient` is the real one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from vmcell_api.node_channel import NodeChannel
from vmcell_protos.pb import node_pb2, node_pb2_grpc

REMOVE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class NewStep:
    """One step, as the client sent it; the node checks what it means."""

    type: str
    args: list[str]
    files_hash: str = ""
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class NewBuild:
    """What the API asks a node to build."""

    build_id: str
    team_id: str
    template_id: str
    from_image: str
    username: str = ""
    password: str = field(default="", repr=False)
    steps: list[NewStep] = field(default_factory=list)
    force: bool = False
    start_command: str = ""
    ready_command: str = ""
    vcpus: int = 1
    memory_mib: int = 512


@dataclass(frozen=True, kw_only=True)
class BuildEntry:
    """A line of a build's log."""

    at_unix_ms: int
    level: str
    message: str
    step: str


@dataclass(frozen=True, kw_only=True)
class NodeBuild:
    """A build as the node sees it: waiting, building, ready or error."""

    build_id: str
    status: str
    entries: list[BuildEntry] = field(default_factory=list)
    reason_message: str = ""
    reason_step: str = ""
    reason_entries: list[BuildEntry] = field(default_factory=list)
    image: str = ""
    default_user: str = ""
    default_workdir: str = ""


class BuildVerbs(Protocol):
    """The verbs; each raises CallerError or HostError."""

    def start(self, build: NewBuild) -> None:
        """Takes a build on; already_exists for an id that was used."""

    def get(self, build_id: str, *, offset: int, limit: int) -> NodeBuild:
        """A build with a page of its log; not_found when the node does not know it."""

    def cancel(self, build_id: str) -> NodeBuild:
        """Ends a build early; one that has ended stays as it is."""

    def remove(self, build_id: str) -> None:
        """Cancels a build and removes image and log; an unknown one is fine."""


class BuildClient:
    """`BuildVerbs` of noded over its unix socket; thread-safe, `close()` is idempotent."""

    def __init__(self, socket_path: str) -> None:
        self._channel = NodeChannel(socket_path, node_pb2_grpc.BuildsStub)
        self._call = self._channel.call

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def start(self, build: NewBuild) -> None:
        login = None
        if build.username:
            login = node_pb2.RegistryLogin(username=build.username, password=build.password)
        request = node_pb2.StartBuildRequest(
            build_id=build.build_id,
            team_id=build.team_id,
            template_id=build.template_id,
            from_image=build.from_image,
            registry_login=login,
            steps=[node_pb2.BuildStep(**vars(step)) for step in build.steps],
            force=build.force,
            start_command=build.start_command,
            ready_command=build.ready_command,
            vcpus=build.vcpus,
            memory_mib=build.memory_mib,
        )
        self._call("StartBuild", request)

    def get(self, build_id: str, *, offset: int, limit: int) -> NodeBuild:
        request = node_pb2.GetBuildRequest(build_id=build_id, offset=offset, limit=limit)
        return _build(self._call("GetBuild", request))

    def cancel(self, build_id: str) -> NodeBuild:
        return _build(self._call("CancelBuild", node_pb2.BuildRef(build_id=build_id)))

    def remove(self, build_id: str) -> None:
        self._call("RemoveBuild", node_pb2.BuildRef(build_id=build_id), REMOVE_TIMEOUT_S)


def _build(message: node_pb2.BuildState) -> NodeBuild:
    return NodeBuild(
        build_id=message.build_id,
        status=message.status,
        entries=[_entry(entry) for entry in message.entries],
        reason_message=message.reason_message,
        reason_step=message.reason_step,
        reason_entries=[_entry(entry) for entry in message.reason_entries],
        image=message.image,
        default_user=message.default_user,
        default_workdir=message.default_workdir,
    )


def _entry(message: node_pb2.BuildLogEntry) -> BuildEntry:
    return BuildEntry(
        at_unix_ms=message.at_unix_ms,
        level=message.level,
        message=message.message,
        step=message.step,
    )
