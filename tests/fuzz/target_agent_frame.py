"""Messages in protobuf's wire format: the agent's answers, containerd's requests, envd's bodies.

Faces the guest, containerd and clients of envd. What decodes comes back from its own bytes the
same, and google.protobuf reads those bytes as the same message; else WireError. Nothing grows out
of proportion to its bytes.
"""

from __future__ import annotations

from supply import Supply

from vmcell_protos import agent, envd_filesystem, envd_process, events, metrics, sandbox, task
from vmcell_protos.ttrpc_messages import Request, Response, Status
from vmcell_protos.wellknown import Any
from vmcell_protos.wire import MAX_ITEMS, Message, WireError

ALLOWED: tuple[type[Exception], ...] = (WireError,)
REACHES = (
    "vmcell_protos.wire:_decode_entry",
    "vmcell_protos.wire:_decode_value",
)


def _messages(module: object) -> list[type[Message]]:
    return [
        kind
        for _, kind in sorted(vars(module).items())
        if isinstance(kind, type) and issubclass(kind, Message) and kind.FIELDS
    ]


KINDS = [Request, Response, Status]
for module in (agent, task, sandbox, events, metrics, envd_process, envd_filesystem):
    KINDS += [kind for kind in _messages(module) if kind not in KINDS]


def one(data: bytes) -> None:
    supply = Supply(data)
    kind = KINDS[supply.number(2) % len(KINDS)]
    message = kind.decode(supply.rest())
    assert _items(message) <= MAX_ITEMS
    again = message.encode()
    assert kind.decode(again) == message
    assert kind.decode(again).encode() == again


def _items(value: object) -> int:
    if isinstance(value, Message):
        return sum(_items(getattr(value, field.name)) for field in value.FIELDS)
    if isinstance(value, list):
        return len(value) + sum(map(_items, value))
    if isinstance(value, dict):
        return len(value) + sum(map(_items, value.values()))
    return 0


def _seed(message: Message) -> bytes:
    return KINDS.index(type(message)).to_bytes(2, "little") + message.encode()


def seeds() -> dict[str, bytes]:
    stats = agent.ContainerStatsResponse(
        cpu={"usage_usec": 5, "user_usec": 3}, memory={"anon": 4096}, memory_usage_bytes=1 << 40
    )
    interface = agent.Interface(
        name="eth0", mac="02:00:00:00:00:01", addresses=["10.88.0.3/31"], mtu=1500,
        routes=[agent.Route(destination="10.4.0.0/16", metric=5)],
        neighbours=[agent.Neighbour(address="169.254.1.1", mac="02:00:00:00:00:02")],
    )  # fmt: skip
    processes = [agent.ListProcessesResponseProcess(guest_pid=1, command="sh")]
    return {
        "hello": _seed(agent.HelloResponse(agent_version="1", kernel_release="6.12")),
        "stats": _seed(stats),
        "exit": _seed(agent.WaitProcessResponse(exit_status=137, exited_at_unix_ns=-1)),
        "guest": _seed(agent.ConfigureGuestRequest(interfaces=[interface], sysctls={"a": "b"})),
        "processes": _seed(agent.ListProcessesResponse(processes=processes)),
        "file": _seed(agent.ReadFileResponse(content=b"127.0.0.1 localhost\n", mode=0o644)),
        "answer": _seed(Response(status=Status(code=5, message="no", details=[Any(value=b"x")]))),
        "create": _seed(task.CreateTaskRequest(id="c1", bundle="/b", terminal=True)),
    }
