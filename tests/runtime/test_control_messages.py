"""Messages between shim and VMM: both ways whole, and anything else refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CODES, CallerError, GuestError, HostError, VmcellError
from vmcell_runtime.config import MachineConfig, VsockConfig
from vmcell_runtime.control import (
    END_REASONS,
    MAX_DETAIL_CHARACTERS,
    MAX_MESSAGE_BYTES,
    Answered,
    BalloonSize,
    Boot,
    ConnectVsock,
    Event,
    Exited,
    Failed,
    GetBalloon,
    ListenVsock,
    Pause,
    PlugBlk,
    PlugPmem,
    Request,
    Resume,
    Running,
    SetBalloon,
    Unplug,
    cut,
    decode_event,
    decode_request,
    encode,
    error_of,
    failed,
)

CONFIG = MachineConfig(
    vcpu_count=2,
    memory_mib=128,
    kernel_descriptor=0,
    vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
)


@pytest.mark.parametrize(
    "message",
    [
        Boot(config=CONFIG, uid=0),
        ConnectVsock(request_id=2**62, port=1025),
        ListenVsock(port=2**32 - 1),
        PlugPmem(request_id=1, window=6),
        PlugBlk(request_id=2, window=40, read_only=True),
        Unplug(request_id=3, window=0),
        Pause(request_id=4),
        Resume(request_id=5),
        SetBalloon(request_id=6, mib=128),
        GetBalloon(request_id=7),
    ],
)
def test_requests_go_round(message: Request) -> None:
    assert decode_request(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Running(),
        Failed(error="HostError", code="internal", message="no"),
        Answered(request_id=1),
        Answered(request_id=1, error="GuestError", code="unavailable", message="closed"),
        BalloonSize(request_id=7, wanted_mib=100, actual_mib=2**31),
        *(Exited(reason=reason, detail="so \u2603") for reason in END_REASONS),
    ],
)
def test_events_go_round(message: Event) -> None:
    assert decode_event(encode(message)) == message


@pytest.mark.parametrize("kind", [GuestError, CallerError, HostError])
@pytest.mark.parametrize("code", sorted(CODES))
def test_errors_cross_with_class_code_and_sentence(kind: type[VmcellError], code: str) -> None:
    event = decode_event(encode(failed(kind("what happened", code=code))))
    assert isinstance(event, Failed)
    error = error_of(event)
    assert (type(error), error.code, str(error)) == (kind, code, "what happened")


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"kind": 5}',
        b'{"kind": "boot"}',
        b'{"kind": "boot", "config": []}',
        b'{"kind": "connect_vsock", "request_id": 1}',
        b'{"kind": "connect_vsock", "request_id": true, "port": 1}',
        b'{"kind": "connect_vsock", "request_id": 1, "port": -1}',
        b'{"kind": "connect_vsock", "request_id": 1, "port": 4294967296}',
        b'{"kind": "listen_vsock", "port": 1, "path": "/etc"}',
        b'{"kind": "running"}',
        b'{"kind": "plug_blk", "request_id": 1, "window": 6}',
        b'{"kind": "plug_blk", "request_id": 1, "window": 6, "read_only": 1}',
        b'{"kind": "plug_blk", "request_id": 1, "window": 6, "read_only": null}',
        b'{"kind": "plug_pmem", "request_id": 1, "window": 65536}',
        b'{"kind": "unplug", "request_id": 1, "window": true}',
        b'{"kind": "pause"}',
        b'{"kind": "set_balloon", "request_id": 1, "mib": -1}',
        b'{"kind": "set_balloon", "request_id": 1, "mib": 4294967296}',
        b"[" * 60_000,
    ],
)
def test_what_is_no_request_is_refused(datagram: bytes) -> None:
    with pytest.raises(CallerError):
        decode_request(datagram)


@pytest.mark.parametrize(
    "datagram",
    [
        b'{"kind": "exited", "reason": "bored", "detail": ""}',
        b'{"kind": "exited", "reason": "killed", "detail": 5}',
        b'{"kind": "failed", "error": "SystemExit", "code": "internal", "message": ""}',
        b'{"kind": "failed", "error": "HostError", "code": "teapot", "message": ""}',
        b'{"kind": "answered", "request_id": 1, "error": "X", "code": "", "message": ""}',
        b'{"kind": "listen_vsock", "port": 1}',
        b'{"kind": "running", "more": 1}',
    ],
)
def test_what_is_no_event_is_refused(datagram: bytes) -> None:
    with pytest.raises(CallerError):
        decode_event(datagram)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(datagram: bytes) -> None:
    for decode in (decode_request, decode_event):
        with pytest.raises(CallerError):
            decode(datagram)


def test_both_sides_keep_to_the_length_limit() -> None:
    with pytest.raises(CallerError, match="too long"):
        encode(Exited(reason="killed", detail="x" * MAX_MESSAGE_BYTES))
    blank = json.dumps({"kind": "running"}).encode() + b" " * MAX_MESSAGE_BYTES
    with pytest.raises(CallerError, match="at most"):
        decode_event(blank)


def test_a_cut_detail_always_fits() -> None:
    detail = cut("\U0001f600" * MAX_MESSAGE_BYTES)
    assert len(detail) == MAX_DETAIL_CHARACTERS
    assert decode_event(encode(Exited(reason="guest_panic", detail=detail)))
