from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateSandboxRequest(_message.Message):
    __slots__ = ("sandbox_id", "template_id", "image", "vcpus", "memory_mib", "timeout_ms", "environment", "access_token", "default_user", "allow_internet", "allow_out", "deny_out", "default_workdir", "start_command", "ready_command", "volume_mounts", "snapshot_id", "pause_on_timeout", "auto_resume")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MIB_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    ACCESS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_USER_FIELD_NUMBER: _ClassVar[int]
    ALLOW_INTERNET_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OUT_FIELD_NUMBER: _ClassVar[int]
    DENY_OUT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_WORKDIR_FIELD_NUMBER: _ClassVar[int]
    START_COMMAND_FIELD_NUMBER: _ClassVar[int]
    READY_COMMAND_FIELD_NUMBER: _ClassVar[int]
    VOLUME_MOUNTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    PAUSE_ON_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    AUTO_RESUME_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    template_id: str
    image: str
    vcpus: int
    memory_mib: int
    timeout_ms: int
    environment: _containers.ScalarMap[str, str]
    access_token: str
    default_user: str
    allow_internet: bool
    allow_out: _containers.RepeatedScalarFieldContainer[str]
    deny_out: _containers.RepeatedScalarFieldContainer[str]
    default_workdir: str
    start_command: str
    ready_command: str
    volume_mounts: _containers.RepeatedCompositeFieldContainer[VolumeMount]
    snapshot_id: str
    pause_on_timeout: bool
    auto_resume: bool
    def __init__(self, sandbox_id: _Optional[str] = ..., template_id: _Optional[str] = ..., image: _Optional[str] = ..., vcpus: _Optional[int] = ..., memory_mib: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., environment: _Optional[_Mapping[str, str]] = ..., access_token: _Optional[str] = ..., default_user: _Optional[str] = ..., allow_internet: _Optional[bool] = ..., allow_out: _Optional[_Iterable[str]] = ..., deny_out: _Optional[_Iterable[str]] = ..., default_workdir: _Optional[str] = ..., start_command: _Optional[str] = ..., ready_command: _Optional[str] = ..., volume_mounts: _Optional[_Iterable[_Union[VolumeMount, _Mapping]]] = ..., snapshot_id: _Optional[str] = ..., pause_on_timeout: _Optional[bool] = ..., auto_resume: _Optional[bool] = ...) -> None: ...

class SandboxRef(_message.Message):
    __slots__ = ("sandbox_id",)
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    def __init__(self, sandbox_id: _Optional[str] = ...) -> None: ...

class Sandbox(_message.Message):
    __slots__ = ("sandbox_id", "template_id", "image", "vcpus", "memory_mib", "disk_mib", "started_at_unix_ms", "end_at_unix_ms", "address", "allow_internet", "allow_out", "deny_out", "volume_mounts", "state", "pause_on_timeout", "auto_resume")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MIB_FIELD_NUMBER: _ClassVar[int]
    DISK_MIB_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    END_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_INTERNET_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OUT_FIELD_NUMBER: _ClassVar[int]
    DENY_OUT_FIELD_NUMBER: _ClassVar[int]
    VOLUME_MOUNTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_ON_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    AUTO_RESUME_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    template_id: str
    image: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    started_at_unix_ms: int
    end_at_unix_ms: int
    address: str
    allow_internet: bool
    allow_out: _containers.RepeatedScalarFieldContainer[str]
    deny_out: _containers.RepeatedScalarFieldContainer[str]
    volume_mounts: _containers.RepeatedCompositeFieldContainer[VolumeMount]
    state: str
    pause_on_timeout: bool
    auto_resume: bool
    def __init__(self, sandbox_id: _Optional[str] = ..., template_id: _Optional[str] = ..., image: _Optional[str] = ..., vcpus: _Optional[int] = ..., memory_mib: _Optional[int] = ..., disk_mib: _Optional[int] = ..., started_at_unix_ms: _Optional[int] = ..., end_at_unix_ms: _Optional[int] = ..., address: _Optional[str] = ..., allow_internet: _Optional[bool] = ..., allow_out: _Optional[_Iterable[str]] = ..., deny_out: _Optional[_Iterable[str]] = ..., volume_mounts: _Optional[_Iterable[_Union[VolumeMount, _Mapping]]] = ..., state: _Optional[str] = ..., pause_on_timeout: _Optional[bool] = ..., auto_resume: _Optional[bool] = ...) -> None: ...

class KillSandboxResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSandboxesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSandboxesResponse(_message.Message):
    __slots__ = ("sandboxes",)
    SANDBOXES_FIELD_NUMBER: _ClassVar[int]
    sandboxes: _containers.RepeatedCompositeFieldContainer[Sandbox]
    def __init__(self, sandboxes: _Optional[_Iterable[_Union[Sandbox, _Mapping]]] = ...) -> None: ...

class ResumeSandboxRequest(_message.Message):
    __slots__ = ("sandbox_id", "timeout_ms", "by_request")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    BY_REQUEST_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    timeout_ms: int
    by_request: bool
    def __init__(self, sandbox_id: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., by_request: _Optional[bool] = ...) -> None: ...

class ResumeSandboxResponse(_message.Message):
    __slots__ = ("sandbox", "resumed")
    SANDBOX_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    sandbox: Sandbox
    resumed: bool
    def __init__(self, sandbox: _Optional[_Union[Sandbox, _Mapping]] = ..., resumed: _Optional[bool] = ...) -> None: ...

class SnapshotRef(_message.Message):
    __slots__ = ("snapshot_id",)
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: str
    def __init__(self, snapshot_id: _Optional[str] = ...) -> None: ...

class MakeSnapshotRequest(_message.Message):
    __slots__ = ("sandbox_id", "snapshot_id", "life_ms")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    LIFE_MS_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    snapshot_id: str
    life_ms: int
    def __init__(self, sandbox_id: _Optional[str] = ..., snapshot_id: _Optional[str] = ..., life_ms: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("snapshot_id", "sandbox_id", "template_id", "vcpus", "memory_mib", "created_at_unix_ms", "expires_at_unix_ms", "parent", "secured", "bytes", "allocated_bytes", "files")
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MIB_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SECURED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: str
    sandbox_id: str
    template_id: str
    vcpus: int
    memory_mib: int
    created_at_unix_ms: int
    expires_at_unix_ms: int
    parent: str
    secured: bool
    bytes: int
    allocated_bytes: int
    files: _containers.RepeatedCompositeFieldContainer[SnapshotFile]
    def __init__(self, snapshot_id: _Optional[str] = ..., sandbox_id: _Optional[str] = ..., template_id: _Optional[str] = ..., vcpus: _Optional[int] = ..., memory_mib: _Optional[int] = ..., created_at_unix_ms: _Optional[int] = ..., expires_at_unix_ms: _Optional[int] = ..., parent: _Optional[str] = ..., secured: _Optional[bool] = ..., bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., files: _Optional[_Iterable[_Union[SnapshotFile, _Mapping]]] = ...) -> None: ...

class SnapshotFile(_message.Message):
    __slots__ = ("name", "bytes", "allocated_bytes", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    allocated_bytes: int
    digest: str
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ("sandbox_id",)
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    def __init__(self, sandbox_id: _Optional[str] = ...) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("snapshots",)
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ...) -> None: ...

class RemoveSnapshotResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("sandbox_id", "snapshot_id", "undo_life_ms")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    UNDO_LIFE_MS_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    snapshot_id: str
    undo_life_ms: int
    def __init__(self, sandbox_id: _Optional[str] = ..., snapshot_id: _Optional[str] = ..., undo_life_ms: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("sandbox", "undo")
    SANDBOX_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    sandbox: Sandbox
    undo: Snapshot
    def __init__(self, sandbox: _Optional[_Union[Sandbox, _Mapping]] = ..., undo: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class DiffSnapshotsRequest(_message.Message):
    __slots__ = ("older_id", "newer_id")
    OLDER_ID_FIELD_NUMBER: _ClassVar[int]
    NEWER_ID_FIELD_NUMBER: _ClassVar[int]
    older_id: str
    newer_id: str
    def __init__(self, older_id: _Optional[str] = ..., newer_id: _Optional[str] = ...) -> None: ...

class DiffSnapshotsResponse(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[FileChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[FileChange, _Mapping]]] = ...) -> None: ...

class FileChange(_message.Message):
    __slots__ = ("path", "what", "size_before", "size_after")
    PATH_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SIZE_AFTER_FIELD_NUMBER: _ClassVar[int]
    path: str
    what: str
    size_before: int
    size_after: int
    def __init__(self, path: _Optional[str] = ..., what: _Optional[str] = ..., size_before: _Optional[int] = ..., size_after: _Optional[int] = ...) -> None: ...

class MemoryUse(_message.Message):
    __slots__ = ("processes", "guest_memory_bytes")
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    GUEST_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    processes: _containers.RepeatedCompositeFieldContainer[ProcessMemory]
    guest_memory_bytes: int
    def __init__(self, processes: _Optional[_Iterable[_Union[ProcessMemory, _Mapping]]] = ..., guest_memory_bytes: _Optional[int] = ...) -> None: ...

class ProcessMemory(_message.Message):
    __slots__ = ("name", "pid", "own", "guest_ram")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    GUEST_RAM_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    own: MemorySum
    guest_ram: MemorySum
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., own: _Optional[_Union[MemorySum, _Mapping]] = ..., guest_ram: _Optional[_Union[MemorySum, _Mapping]] = ...) -> None: ...

class MemorySum(_message.Message):
    __slots__ = ("rss_bytes", "pss_bytes", "shared_clean_bytes", "shared_dirty_bytes", "private_clean_bytes", "private_dirty_bytes", "swap_bytes")
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    PSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_CLEAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_CLEAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    rss_bytes: int
    pss_bytes: int
    shared_clean_bytes: int
    shared_dirty_bytes: int
    private_clean_bytes: int
    private_dirty_bytes: int
    swap_bytes: int
    def __init__(self, rss_bytes: _Optional[int] = ..., pss_bytes: _Optional[int] = ..., shared_clean_bytes: _Optional[int] = ..., shared_dirty_bytes: _Optional[int] = ..., private_clean_bytes: _Optional[int] = ..., private_dirty_bytes: _Optional[int] = ..., swap_bytes: _Optional[int] = ...) -> None: ...

class SetDeadlineRequest(_message.Message):
    __slots__ = ("sandbox_id", "timeout_ms", "only_extend")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    ONLY_EXTEND_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    timeout_ms: int
    only_extend: bool
    def __init__(self, sandbox_id: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., only_extend: _Optional[bool] = ...) -> None: ...

class SetEgressRequest(_message.Message):
    __slots__ = ("sandbox_id", "allow_internet", "allow_out", "deny_out")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    ALLOW_INTERNET_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OUT_FIELD_NUMBER: _ClassVar[int]
    DENY_OUT_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    allow_internet: bool
    allow_out: _containers.RepeatedScalarFieldContainer[str]
    deny_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sandbox_id: _Optional[str] = ..., allow_internet: _Optional[bool] = ..., allow_out: _Optional[_Iterable[str]] = ..., deny_out: _Optional[_Iterable[str]] = ...) -> None: ...

class ReadMetricsRequest(_message.Message):
    __slots__ = ("sandbox_ids", "start_unix_ms", "end_unix_ms", "newest_only")
    SANDBOX_IDS_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    END_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_ONLY_FIELD_NUMBER: _ClassVar[int]
    sandbox_ids: _containers.RepeatedScalarFieldContainer[str]
    start_unix_ms: int
    end_unix_ms: int
    newest_only: bool
    def __init__(self, sandbox_ids: _Optional[_Iterable[str]] = ..., start_unix_ms: _Optional[int] = ..., end_unix_ms: _Optional[int] = ..., newest_only: _Optional[bool] = ...) -> None: ...

class ReadMetricsResponse(_message.Message):
    __slots__ = ("sandboxes",)
    SANDBOXES_FIELD_NUMBER: _ClassVar[int]
    sandboxes: _containers.RepeatedCompositeFieldContainer[SandboxMetrics]
    def __init__(self, sandboxes: _Optional[_Iterable[_Union[SandboxMetrics, _Mapping]]] = ...) -> None: ...

class SandboxMetrics(_message.Message):
    __slots__ = ("sandbox_id", "samples")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    samples: _containers.RepeatedCompositeFieldContainer[MetricSample]
    def __init__(self, sandbox_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[MetricSample, _Mapping]]] = ...) -> None: ...

class MetricSample(_message.Message):
    __slots__ = ("unix_ms", "cpu_count", "cpu_used_pct", "mem_used_bytes", "mem_total_bytes", "mem_cache_bytes", "disk_used_bytes", "disk_total_bytes")
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    CPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    CPU_USED_PCT_FIELD_NUMBER: _ClassVar[int]
    MEM_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEM_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEM_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    unix_ms: int
    cpu_count: int
    cpu_used_pct: float
    mem_used_bytes: int
    mem_total_bytes: int
    mem_cache_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    def __init__(self, unix_ms: _Optional[int] = ..., cpu_count: _Optional[int] = ..., cpu_used_pct: _Optional[float] = ..., mem_used_bytes: _Optional[int] = ..., mem_total_bytes: _Optional[int] = ..., mem_cache_bytes: _Optional[int] = ..., disk_used_bytes: _Optional[int] = ..., disk_total_bytes: _Optional[int] = ...) -> None: ...

class VolumeMount(_message.Message):
    __slots__ = ("volume_id", "name", "path")
    VOLUME_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    volume_id: str
    name: str
    path: str
    def __init__(self, volume_id: _Optional[str] = ..., name: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class VolumeRef(_message.Message):
    __slots__ = ("volume_id",)
    VOLUME_ID_FIELD_NUMBER: _ClassVar[int]
    volume_id: str
    def __init__(self, volume_id: _Optional[str] = ...) -> None: ...

class MakeVolumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RemoveVolumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeInfoResponse(_message.Message):
    __slots__ = ("containerd_version", "slot_count", "slots_free")
    CONTAINERD_VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    containerd_version: str
    slot_count: int
    slots_free: int
    def __init__(self, containerd_version: _Optional[str] = ..., slot_count: _Optional[int] = ..., slots_free: _Optional[int] = ...) -> None: ...

class BuildStep(_message.Message):
    __slots__ = ("type", "args", "files_hash", "force")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    FILES_HASH_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    type: str
    args: _containers.RepeatedScalarFieldContainer[str]
    files_hash: str
    force: bool
    def __init__(self, type: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., files_hash: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class RegistryLogin(_message.Message):
    __slots__ = ("username", "password")
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    username: str
    password: str
    def __init__(self, username: _Optional[str] = ..., password: _Optional[str] = ...) -> None: ...

class StartBuildRequest(_message.Message):
    __slots__ = ("build_id", "team_id", "template_id", "from_image", "registry_login", "steps", "force", "start_command", "ready_command", "vcpus", "memory_mib")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEAM_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_IMAGE_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_LOGIN_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    START_COMMAND_FIELD_NUMBER: _ClassVar[int]
    READY_COMMAND_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MIB_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    team_id: str
    template_id: str
    from_image: str
    registry_login: RegistryLogin
    steps: _containers.RepeatedCompositeFieldContainer[BuildStep]
    force: bool
    start_command: str
    ready_command: str
    vcpus: int
    memory_mib: int
    def __init__(self, build_id: _Optional[str] = ..., team_id: _Optional[str] = ..., template_id: _Optional[str] = ..., from_image: _Optional[str] = ..., registry_login: _Optional[_Union[RegistryLogin, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[BuildStep, _Mapping]]] = ..., force: _Optional[bool] = ..., start_command: _Optional[str] = ..., ready_command: _Optional[str] = ..., vcpus: _Optional[int] = ..., memory_mib: _Optional[int] = ...) -> None: ...

class BuildRef(_message.Message):
    __slots__ = ("build_id",)
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    def __init__(self, build_id: _Optional[str] = ...) -> None: ...

class GetBuildRequest(_message.Message):
    __slots__ = ("build_id", "offset", "limit")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    offset: int
    limit: int
    def __init__(self, build_id: _Optional[str] = ..., offset: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class BuildLogEntry(_message.Message):
    __slots__ = ("at_unix_ms", "level", "message", "step")
    AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    at_unix_ms: int
    level: str
    message: str
    step: str
    def __init__(self, at_unix_ms: _Optional[int] = ..., level: _Optional[str] = ..., message: _Optional[str] = ..., step: _Optional[str] = ...) -> None: ...

class BuildState(_message.Message):
    __slots__ = ("build_id", "status", "entries", "reason_message", "reason_step", "reason_entries", "image", "default_user", "default_workdir")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    REASON_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_USER_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_WORKDIR_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    status: str
    entries: _containers.RepeatedCompositeFieldContainer[BuildLogEntry]
    reason_message: str
    reason_step: str
    reason_entries: _containers.RepeatedCompositeFieldContainer[BuildLogEntry]
    image: str
    default_user: str
    default_workdir: str
    def __init__(self, build_id: _Optional[str] = ..., status: _Optional[str] = ..., entries: _Optional[_Iterable[_Union[BuildLogEntry, _Mapping]]] = ..., reason_message: _Optional[str] = ..., reason_step: _Optional[str] = ..., reason_entries: _Optional[_Iterable[_Union[BuildLogEntry, _Mapping]]] = ..., image: _Optional[str] = ..., default_user: _Optional[str] = ..., default_workdir: _Optional[str] = ...) -> None: ...

class RemoveBuildResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
