"""Messages between shim and VMM, and to and from the zygote.

Faces a VMM that a guest has taken over, and every process of the host that may open the zygote's
socket. What decodes comes back from its own bytes the same; else CallerError or MalformedMessage.
"""

from __future__ import annotations

from json_input import expand
from supply import Supply

from vmcell_protos import zygote
from vmcell_protos.errors import CallerError
from vmcell_runtime import control
from vmcell_runtime.config import BlkConfig, MachineConfig, NetConfig, PmemConfig, VsockConfig

ALLOWED: tuple[type[Exception], ...] = (CallerError, zygote.MalformedMessage)
REACHES = (
    "vmcell_runtime.config:from_json",
    "vmcell_runtime.control:error_of",
    "vmcell_protos.zygote:decode_request",
    "vmcell_protos.zygote:decode_answer",
)
EVENT, REQUEST, ZYGOTE_REQUEST, ZYGOTE_ANSWER = range(4)


def one(data: bytes) -> None:
    supply = Supply(data)
    mode = supply.byte() % 4
    datagram = supply.rest()
    if mode == EVENT:
        event = control.decode_event(expand(datagram))
        assert control.decode_event(control.encode(event)) == event
    elif mode == REQUEST:
        request = control.decode_request(expand(datagram))
        assert control.decode_request(control.encode(request)) == request
    elif mode == ZYGOTE_REQUEST:
        asked = zygote.decode_request(datagram)
        again = zygote.decode_request(zygote.encode_request(asked))
        assert (again.argv, again.environment) == (asked.argv, asked.environment)
    else:
        answer = zygote.decode_answer(datagram)
        again = zygote.decode_answer(zygote.encode_answer(answer))
        assert (again.number, again.output) == (answer.number, answer.output)


def seeds() -> dict[str, bytes]:
    config = MachineConfig(
        vcpu_count=2,
        memory_mib=512,
        kernel_descriptor=0,
        command_line="quiet",
        pmem=(PmemConfig(descriptor=1),),
        blk=(BlkConfig(descriptor=2, read_only=True),),
        net=(NetConfig(tap_descriptor=3, mac="02:00:00:00:00:01"),),
        vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
        console_descriptor=4,
        spare_windows=2,
        balloon=True,
    )
    events = {
        "running": control.Running(),
        "failed": control.Failed(error="HostError", code="unavailable", message="no"),
        "answered": control.Answered(request_id=7),
        "refused": control.Answered(
            request_id=7, error="GuestError", code="aborted", message="it said no"
        ),
        "balloon": control.BalloonSize(request_id=1, wanted_mib=64, actual_mib=3),
        "saved": control.Saved(request_id=1, memory_bytes=1 << 30),
        "exited": control.Exited(reason="guest_panic", detail="Kernel panic"),
    }
    requests = {
        "boot": control.Boot(config=config, uid=2_000_000_001),
        "restore": control.Restore(config=config, uid=0),
        "plug": control.PlugBlk(request_id=3, window=9, read_only=True),
        "connect": control.ConnectVsock(request_id=4, port=1025),
    }
    run = zygote.Request(zygote.RUN, b"here", argv=[b"start", b"-id"], environment=[b"A=b"])
    answer = zygote.Answer(zygote.DONE, number=1, output=b"unix:///s", errors=b"none")
    return {
        **{name: b"\0" + control.encode(row) for name, row in events.items()},
        **{name: b"\x01" + control.encode(row) for name, row in requests.items()},
        "zygote-run": b"\x02" + zygote.encode_request(run),
        "zygote-done": b"\x03" + zygote.encode_answer(answer),
    }
