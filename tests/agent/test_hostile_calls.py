"""Calls with wrong types, huge values and unknown ids: each gets one answer, and PID 1 goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import AgentUnderTest, container_spec, process_spec, run, running_agent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError
from vmcell_protos.wire import Message

pytestmark = pytest.mark.root

# Every method that a mistake of the caller cannot hurt this machine with: not the clock.
METHODS: dict[str, type[Message]] = {
    "AttachDevice": messages.AttachDeviceRequest,
    "DetachDevice": messages.DetachDeviceRequest,
    "UpdateContainer": messages.UpdateContainerRequest,
    "FreezeContainer": messages.ContainerRef,
    "ThawContainer": messages.ContainerRef,
    "WaitOom": messages.WaitOomRequest,
    "CopyFiles": messages.CopyFilesRequest,
    "ReadFile": messages.ReadFileRequest,
    "CreateContainer": messages.CreateContainerRequest,
    "ContainerStats": messages.ContainerRef,
}
_IDS = st.sampled_from(["c1", "c1", "c1", "", "c2", "../c1", "x" * 500, "c1\0"])
_TEXTS = st.sampled_from(["", "/", "/etc/a", "/tree/x", "/tree/../x", "a\0b", "\n", "/" * 5000])
_VALUES = {
    "string": _TEXTS,
    "bytes": st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b"nul", b'{"memory":1}']),
    "bool": st.booleans(),
    "uint32": st.sampled_from([0, 1, 3, 255, (1 << 20) + 1, (1 << 32) - 1]),
    "uint64": st.sampled_from([1 << 63, (1 << 64) - 1]),
}


def anything(kind: type[Message]) -> st.SearchStrategy[Message]:
    """A message whose fields are as wrong as their types allow."""
    fields = {}
    for field in kind.FIELDS:
        if field.message is not None:
            value: st.SearchStrategy[object] = anything(field.message)
        elif field.name == "container_id":
            value = _IDS
        else:
            value = _VALUES[field.kind]
        fields[field.name] = st.lists(value, max_size=3) if field.label == "repeated" else value
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


@pytest.fixture(scope="module")
def victim(busybox_image: Path) -> Iterator[AgentUnderTest]:
    """An agent with one running container, c1, that has a copied tree and file."""
    with running_agent() as running:
        running.attach_lower(busybox_image)
        init = running.create(
            container_spec(process_spec("sleep", "1000")),
            upper="",
            files=[
                messages.FileCopy(destination="/tree", mode=0o755, directory=True),
                messages.FileCopy(destination="/etc/a", mode=0o644, content=b"x"),
            ],
        )
        init.start()
        yield running


def agent_hostname(agent: AgentUnderTest) -> str:
    return run("nsenter", "-t", str(agent.agent_pid), "--uts", "hostname")


def alive(agent: AgentUnderTest) -> None:
    agent.client.call("ThawContainer", messages.ContainerRef(container_id="c1"))
    agent.client.call("ContainerStats", messages.ContainerRef(container_id="c1"))


def answer(agent: AgentUnderTest, method: str, request: Message) -> str:
    """The error's sentence, "" for success and for a call that may wait."""
    call = agent.client.begin(method, request)
    if method == "WaitOom" and not agent.client.answered(call, 0.05):
        return ""
    try:
        agent.client.finish(call)
    except VmcellError as error:
        return str(error)
    return ""


# What a bug in a child of the agent's would be told as.
_BUG = re.compile(r"\b(Type|Value|Key|Index|Attribute|Assertion|Unicode\w*|Memory|Name)Error\b")


@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_message_is_answered(victim: AgentUnderTest, method: str, data: st.DataObject) -> None:
    assert not _BUG.search(answer(victim, method, data.draw(anything(METHODS[method]))))
    alive(victim)


class Raw(Message):
    """Bytes that are no message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self) -> bytes:
        return self.data


@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_answered(victim: AgentUnderTest, method: str, data: bytes) -> None:
    assert not _BUG.search(answer(victim, method, Raw(data)))
    alive(victim)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (messages.ConfigureGuestRequest(hostname="x" * 65), "it must have 1 to 64"),
        (messages.ConfigureGuestRequest(entropy=bytes(5000)), "at most 4096"),
        (messages.ConfigureGuestRequest(unix_time_ns=-1), "before the year 2020"),
        (messages.ConfigureGuestRequest(unix_time_ns=1), "before the year 2020"),
        (
            messages.ConfigureGuestRequest(
                hostname="never", interfaces=[messages.Interface(mac="x", addresses=["y"])]
            ),
            "no IP address",
        ),
        (messages.ConfigureGuestRequest(sysctls={"kernel.panic": "1"}), "of its own"),
        (messages.ConfigureGuestRequest(sysctls={"net/../kernel/panic": "1"}), "of its own"),
        (messages.ConfigureGuestRequest(interfaces=[messages.Interface()] * 20), "20 interfaces"),
    ],
)
def test_a_guest_that_cannot_be_so_configured(
    victim: AgentUnderTest, request_: messages.ConfigureGuestRequest, words: str
) -> None:
    with pytest.raises(VmcellError, match=words):
        victim.client.call("ConfigureGuest", request_)
    assert agent_hostname(victim) != "never"
    alive(victim)
