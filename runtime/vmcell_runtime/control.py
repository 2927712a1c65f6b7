"""Messages between the shim and its VMM; bytes in, records out, no I/O.

One JSON object per datagram of a SOCK_SEQPACKET pair. Descriptors travel with Boot, Restore, Save,
ConnectVsock, ListenVsock, PlugPmem and PlugBlk, from the shim to the VMM only, which owns them from
then on.
A request with a `request_id` is answered by one event with the same. Each side trusts the other's
bytes as little as any: what does not decode to one of these records is a CallerError.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeVar, get_args

from vmcell_protos.errors import CODES, CallerError, GuestError, HostError, VmcellError
from vmcell_runtime.config import MachineConfig, from_json

M = TypeVar("M")

MAX_MESSAGE_BYTES = 65_536
MAX_DETAIL_CHARACTERS = 4096
END_REASONS = (
    "guest_shutdown",
    "guest_reset",
    "guest_panic",
    "triple_fault",
    "guest_fault",
    "vmm_error",
    "killed",
)


@dataclass(frozen=True, kw_only=True)
class Boot:
    """Shim: start this machine. The configuration's descriptors come first, in its order.

    Then one stream socket for each of `config.vsock.listen_ports`, then /dev/kvm, and with a `uid`
    what holds it (`vmcell_runtime.vmm_uid`). `uid` is 0 where the shim is not root.
    """

    kind: ClassVar[str] = "boot"
    config: MachineConfig
    uid: int


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Shim: make this machine, which was saved, and let it stand still.

    Descriptors as with Boot, but between the sockets and /dev/kvm come two more, for reading: the
    memory and the state as Save wrote them. `config` is as of the boot, with this one's devices.
    """

    kind: ClassVar[str] = "restore"
    config: MachineConfig
    uid: int


@dataclass(frozen=True, kw_only=True)
class Save:
    """Shim: write the paused machine to the two files that come along; answered by Saved.

    The first is for memory, open for reading and writing: a copy of what this machine's memory came
    from or last was saved to, or a hole of the RAM's length. The guest goes on with it as its
    memory, so nobody may write to it afterwards. The second, empty, takes the rest.
    """

    kind: ClassVar[str] = "save"
    request_id: int


@dataclass(frozen=True, kw_only=True)
class ConnectVsock:
    """Shim: join the stream socket that comes along to `port` of the guest."""

    kind: ClassVar[str] = "connect_vsock"
    request_id: int
    port: int


@dataclass(frozen=True, kw_only=True)
class ListenVsock:
    """Shim: join the stream socket that comes along to the guest's next connection to `port`."""

    kind: ClassVar[str] = "listen_vsock"
    port: int


@dataclass(frozen=True, kw_only=True)
class PlugPmem:
    """Shim: the image that comes along as virtio-pmem at a spare window."""

    kind: ClassVar[str] = "plug_pmem"
    request_id: int
    window: int


@dataclass(frozen=True, kw_only=True)
class PlugBlk:
    """Shim: the disk that comes along as virtio-blk at a spare window."""

    kind: ClassVar[str] = "plug_blk"
    request_id: int
    window: int
    read_only: bool


@dataclass(frozen=True, kw_only=True)
class Unplug:
    """Shim: empty this spare window."""

    kind: ClassVar[str] = "unplug"
    request_id: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Shim: let the vCPUs stand still; answered when they do."""

    kind: ClassVar[str] = "pause"
    request_id: int


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Shim: let the vCPUs go on."""

    kind: ClassVar[str] = "resume"
    request_id: int


@dataclass(frozen=True, kw_only=True)
class SetBalloon:
    """Shim: ask the guest to give so much memory back."""

    kind: ClassVar[str] = "set_balloon"
    request_id: int
    mib: int


@dataclass(frozen=True, kw_only=True)
class GetBalloon:
    """Shim: how far is it? Answered by BalloonSize."""

    kind: ClassVar[str] = "get_balloon"
    request_id: int


@dataclass(frozen=True, kw_only=True)
class Running:
    """VMM: the vCPUs have started, or stand still as they were saved."""

    kind: ClassVar[str] = "running"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """VMM: the machine could not be made; `error` is the name of one of the three error classes."""

    kind: ClassVar[str] = "failed"
    error: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Answered:
    """VMM: the request is done, or could not be: an error as in Failed.

    To ConnectVsock it means that the guest accepted.
    """

    kind: ClassVar[str] = "answered"
    request_id: int
    error: str = ""
    code: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class BalloonSize:
    """VMM: what the guest was asked to give back, and what it says it has."""

    kind: ClassVar[str] = "balloon_size"
    request_id: int
    wanted_mib: int
    actual_mib: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """VMM: the machine is in its files; how much of its memory had to be written."""

    kind: ClassVar[str] = "saved"
    request_id: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Exited:
    """VMM: its last message; `reason` is one of END_REASONS, `detail` a sentence or empty."""

    kind: ClassVar[str] = "exited"
    reason: str
    detail: str


Plain = PlugPmem | PlugBlk | Unplug | Pause | Resume | Save | SetBalloon | GetBalloon
"""What the VMM does by itself, without the guest's driver having to answer."""
Start = Boot | Restore
"""What a VMM is asked first, and once."""
Request = Start | ConnectVsock | ListenVsock | Plain
Answer = Answered | BalloonSize | Saved
Event = Running | Failed | Answer | Exited

_REQUESTS: dict[str, type[Request]] = {m.kind: m for m in get_args(Request)}
_EVENTS: dict[str, type[Event]] = {m.kind: m for m in get_args(Event)}
_ERRORS: dict[str, type[VmcellError]] = {
    "GuestError": GuestError,
    "CallerError": CallerError,
    "HostError": HostError,
}
_TYPES: dict[str, type] = {"int": int, "str": str, "bool": bool}
_FIELD_LIMITS = {
    "request_id": 2**63,
    "uid": 2**31,
    "port": 2**32,
    "window": 2**16,
    "mib": 2**32,
    "wanted_mib": 2**32,
    "actual_mib": 2**32,
    "memory_bytes": 2**63,
}


def encode(message: Request | Event) -> bytes:
    """One datagram."""
    datagram = json.dumps({"kind": message.kind, **asdict(message)}).encode()
    if len(datagram) > MAX_MESSAGE_BYTES:
        raise CallerError(f"a {message.kind} message has {len(datagram)} bytes; too long to send")
    return datagram


def decode_request(datagram: bytes) -> Request:
    """What the shim asks."""
    kind, fields = _open(datagram)
    if kind in (Boot.kind, Restore.kind):
        _check_fields(kind, fields, {"config": dict, "uid": int})
        message = Boot if kind == Boot.kind else Restore
        return message(config=from_json(fields["config"]), uid=int(str(fields["uid"])))
    if kind not in _REQUESTS:
        raise CallerError(f"the VMM got a message of unknown kind {kind!r}")
    return _make(_REQUESTS[kind], fields)


def decode_event(datagram: bytes) -> Event:
    """What the VMM says."""
    kind, fields = _open(datagram)
    if kind not in _EVENTS:
        raise CallerError(f"the VMM sent a message of unknown kind {kind!r}")
    event = _make(_EVENTS[kind], fields)
    if isinstance(event, Exited) and event.reason not in END_REASONS:
        raise CallerError(f"the VMM gave the unknown end reason {event.reason!r}")
    if isinstance(event, Failed):
        error_of(event)
    if isinstance(event, Answered) and event.error:
        error_of(event)
    return event


def failed(error: VmcellError) -> Failed:
    """The message that carries `error` over."""
    name = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
    return Failed(error=name, code=error.code, message=cut(str(error)))


def answered(request_id: int, error: VmcellError | None = None) -> Answered:
    """The answer to a request: done, or `error`."""
    if error is None:
        return Answered(request_id=request_id)
    said = failed(error)
    return Answered(request_id=request_id, error=said.error, code=said.code, message=said.message)


def error_of(event: Failed | Answered) -> VmcellError:
    """The error that an event carries, to be raised on this side."""
    if event.error not in _ERRORS or event.code not in CODES:
        raise CallerError(f"the VMM gave the unknown error {event.error!r} code {event.code!r}")
    return _ERRORS[event.error](event.message, code=event.code)


def cut(text: str) -> str:
    """`text` shortened to what a message may carry."""
    return text[:MAX_DETAIL_CHARACTERS]


def _open(datagram: bytes) -> tuple[str, dict[str, object]]:
    if len(datagram) > MAX_MESSAGE_BYTES:
        raise CallerError(f"a control message has {len(datagram)} bytes; at most 65536")
    try:
        tree = json.loads(datagram)
    except (ValueError, RecursionError) as error:
        raise CallerError(f"a control message is not JSON: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("kind"), str):
        raise CallerError("a control message is not an object with a kind")
    return tree.pop("kind"), tree


def _make(message: type[M], fields: dict[str, object]) -> M:
    # Annotations are strings here, and only these types occur outside of Boot.
    types = {name: _TYPES[text] for name, text in message.__annotations__.items() if text in _TYPES}
    _check_fields(getattr(message, "kind", ""), fields, types)
    return message(**fields)


def _check_fields(kind: str, fields: dict[str, object], types: dict[str, type]) -> None:
    if fields.keys() != types.keys():
        raise CallerError(f"a {kind} message has fields {sorted(fields)}, not {sorted(types)}")
    for name, wanted in types.items():
        value = fields[name]
        if type(value) is not wanted:
            raise CallerError(f"{name} of a {kind} message is not of type {wanted.__name__}")
        if type(value) is int and not 0 <= value < _FIELD_LIMITS[name]:
            raise CallerError(f"{name} of a {kind} message is {value}; out of range")
