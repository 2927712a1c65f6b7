"""OCI specs: what is understood, what is refused by name, and that nothing else can come out."""

from __future__ import annotations

import contextlib
import json
import resource
from typing import Any

import pytest
from agent_harness import container_spec, process_spec
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent import abi, capabilities
from vmcell_agent.jsonfields import parse_object
from vmcell_agent.mountoptions import parse_mount
from vmcell_agent.ociprocess import RLIMITS, parse_process
from vmcell_agent.ocispec import ContainerSpec, parse_spec
from vmcell_protos.errors import CallerError


def parse(spec: dict[str, Any]) -> ContainerSpec:
    return parse_spec(json.dumps(spec).encode())


def with_linux(**changes: Any) -> dict[str, Any]:
    spec = container_spec(process_spec("true"))
    spec["linux"].update(changes)
    return spec


def test_a_plain_container() -> None:
    spec = parse(container_spec(process_spec("sh", "-c", "true")))
    assert spec.process.args == ("sh", "-c", "true")
    assert spec.hostname == "box"
    assert [mount.fstype for mount in spec.mounts] == [
        "proc", "tmpfs", "devpts", "tmpfs", "mqueue", "sysfs", "tmpfs",
    ]  # fmt: skip
    assert spec.mounts[1].data == "mode=755,size=65536k"
    assert spec.mounts[5].flags & abi.MS_RDONLY
    assert spec.cgroup_files == {}


def test_limits_become_cgroup_files() -> None:
    resources = {
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0"},
        "pids": {"limit": 100},
        "unified": {"memory.high": "1000000"},
    }
    assert parse(with_linux(resources=resources)).cgroup_files == {
        "memory.max": "67108864",
        "memory.low": "33554432",
        "memory.swap.max": "33554432",
        "cpu.weight": "39",
        "cpu.max": "50000 100000",
        "cpuset.cpus": "0",
        "pids.max": "100",
        "memory.high": "1000000",
    }


def test_no_limit_is_said_as_max() -> None:
    resources = {"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}}
    assert parse(with_linux(resources=resources)).cgroup_files == {
        "memory.max": "max",
        "memory.swap.max": "max",
        "cpu.max": "max 100000",
        "pids.max": "max",
    }


def test_sysctl_names_become_paths() -> None:
    sysctl = {"net.ipv4.ip_forward": "1", "net.ipv4.conf.eth0/1.forwarding": "1"}
    assert parse(with_linux(sysctl=sysctl)).sysctls == {
        "net/ipv4/ip_forward": "1",
        "net/ipv4/conf/eth0.1/forwarding": "1",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"namespaces": [{"type": "user"}]}, "namespace 'user' is not supported"),
        ({"namespaces": [{"type": "time"}]}, "namespace 'time' is not supported"),
        ({"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}, "is the host's"),
        ({"uidMappings": [{"containerID": 0}]}, "spec.linux.uidMappings is not supported"),
        ({"personality": {"domain": "LINUX32"}}, "spec.linux.personality is not supported"),
        ({"sysctl": {"kernel.core_pattern": "|/x"}}, "'kernel.core_pattern' is not one"),
        ({"sysctl": {"net.../../kernel/x": "1"}}, "is not one a container has"),
        ({"resources": {"unified": {"../x": "1"}}}, "no file of cgroup v2"),
        ({"devices": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]}, "/dev/sda"),
        ({"devices": [{"path": "/etc/x", "type": "c", "major": 1, "minor": 3}]}, "below /dev"),
        ({"maskedPaths": ["proc"]}, "must be absolute"),
        ({"rootfsPropagation": "sideways"}, "no such propagation"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CallerError) as error:
        parse(with_linux(**changes))
    assert words in str(error.value)


def test_network_namespace_of_the_host_is_the_guests_own() -> None:
    parse(with_linux(namespaces=[{"type": "network", "path": "/var/run/netns/x"}]))


def test_hooks_for_the_guest_are_refused_and_those_of_the_host_are_not_ours() -> None:
    spec = container_spec(process_spec("true"), hooks={"createRuntime": [{"path": "/bin/x"}]})
    parse(spec)
    spec["hooks"] = {"startContainer": [{"path": "/bin/x"}]}
    with pytest.raises(CallerError, match=r"spec\.hooks\.startContainer"):
        parse(spec)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": []}, "process.args is empty"),
        ({"args": ["a\0b"]}, "NUL byte"),
        ({"args": ["\ud800"]}, "not valid Unicode"),
        ({"args": "sh"}, "must be a list, not str"),
        ({"cwd": "relative"}, "must be absolute"),
        ({"env": ["novalue"]}, "must be NAME=value"),
        ({"user": {"uid": 1 << 31}}, "user.uid is 2147483648"),
        ({"user": {"uid": True}}, "must be a whole number"),
        ({"capabilities": {"bounding": ["CAP_FLY"]}}, "'CAP_FLY'"),
        ({"capabilities": {"effective": ["CAP_KILL"]}}, "holds more than"),
        ({"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}, "RLIMIT_X"),
        ({"rlimits": [{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]}, "soft 2 above hard 1"),
        ({"scheduler": {"policy": "SCHED_FIFO"}}, "process.scheduler is not supported"),
    ],
)
def test_a_process_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    data = json.dumps(process_spec("true", **changes)).encode()
    with pytest.raises(CallerError) as error:
        parse_process(parse_object(data, "process"))
    assert words in str(error.value)


def test_unlimited_is_infinity() -> None:
    limit = {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": (1 << 64) - 1}
    data = json.dumps(process_spec("true", rlimits=[limit])).encode()
    row = parse_process(parse_object(data, "process")).rlimits[0]
    assert (row.number, row.soft, row.hard) == (7, 1024, resource.RLIM_INFINITY)


def test_tables_match_the_kernels_headers() -> None:
    """The numbers are given by position or by CPython; a few known ones pin them down."""
    assert len(capabilities.NAMES) == 41
    assert capabilities.bits(["CAP_SYS_ADMIN", "cap_bpf"], "x") == 1 << 21 | 1 << 39
    assert (RLIMITS["RLIMIT_LOCKS"], RLIMITS["RLIMIT_RTTIME"], RLIMITS["RLIMIT_NICE"]) == (
        10,
        15,
        13,
    )
    assert sorted(RLIMITS.values()) == list(range(16))


@pytest.mark.parametrize(
    ("fstype", "options", "words"),
    [
        ("bind", [], "binds a host path"),
        ("none", ["rbind"], "binds a host path"),
        ("tmpfs", ["bind"], "binds a host path"),
        ("nfs", [], "type is 'nfs'"),
        ("tmpfs", ["tmpcopyup"], "option 'tmpcopyup'"),
        ("tmpfs", ["idmap"], "option 'idmap'"),
    ],
)
def test_mounts_that_are_refused(fstype: str, options: list[str], words: str) -> None:
    with pytest.raises(CallerError) as error:
        parse_mount("/data", fstype, options, "spec.mounts[0]")
    assert words in str(error.value)


def test_later_mount_options_win() -> None:
    row = parse_mount("/x", "tmpfs", ["ro", "nosuid", "rw", "rslave", "size=1k"], "m")
    assert (row.flags, row.data) == (abi.MS_NOSUID, "size=1k")
    assert row.propagation == abi.MS_SLAVE | abi.MS_REC


def test_a_live_directory_is_a_number_of_the_share() -> None:
    options = ["rbind", "rprivate", "ro", "noexec", "z"]
    row = parse_mount("/data", "virtiofs", options, "m", source="17")
    assert (row.source, row.data) == ("17", "")
    flags = abi.MS_RDONLY | abi.MS_NOEXEC
    assert row.flags == abi.MS_NOSUID | abi.MS_NODEV | flags
    assert row.propagation == abi.MS_PRIVATE | abi.MS_REC
    for words in (["rro"], ["suid", "dev", "ro"]):
        row = parse_mount("/data", "virtiofs", words, "m", source="0")
        assert row.flags == abi.MS_NOSUID | abi.MS_NODEV | abi.MS_RDONLY


@pytest.mark.parametrize(
    "source",
    ["", "00", "01", "-1", "+1", "1 ", " 1", "1\n", "1/..", "../1", "vmcell", "٣", "1" * 10],
)
def test_what_is_no_plain_number_is_no_live_directory(source: str) -> None:
    with pytest.raises(CallerError, match=r"m\.source is .*; virtiofs takes a number"):
        parse_mount("/data", "virtiofs", [], "m", source=source)


@pytest.mark.parametrize("options", [[], ["rw"], ["ro"], ["ro", "nosuid", "rw"]])
def test_sysfs_is_read_only_whatever_is_asked_for(options: list[str]) -> None:
    assert parse_mount("/sys", "sysfs", options, "m").flags & abi.MS_RDONLY


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(["process", "linux", "mounts", "root", "hostname", "hooks"]), _JSON)
def test_any_json_is_understood_or_refused(key: str, value: object) -> None:
    spec = container_spec(process_spec("true"))
    spec[key] = value
    with contextlib.suppress(CallerError):
        assert parse_spec(json.dumps(spec).encode()).process.args


@given(st.data())
def test_any_value_in_any_field_is_understood_or_refused(data: st.DataObject) -> None:
    spec = container_spec(process_spec("true", rlimits=[{"type": "RLIMIT_CORE"}]))
    place: Any = spec
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    with contextlib.suppress(CallerError):
        assert parse_spec(json.dumps(spec).encode()).process.args


@given(st.binary(max_size=64))
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    with pytest.raises(CallerError):
        parse_spec(data)


def test_deep_and_large_json_is_refused() -> None:
    with pytest.raises(CallerError, match="not JSON"):
        parse_spec(b"[" * 100_000)
    with pytest.raises(CallerError, match="at most"):
        parse_spec(b" " * (1 << 20) + b"{}")
