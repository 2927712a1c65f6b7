"""`linux.resources` as files of a cgroup, and how they are changed or set back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentUnderTest, container_spec, process_spec
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent.cgroup import Cgroup
from vmcell_agent.jsonfields import parse_object
from vmcell_agent.limits import Limits
from vmcell_agent.resources import cgroup_files
from vmcell_protos import agent as messages
from vmcell_protos.errors import CallerError, VmcellError

MAX = {
    "memory.max": "max",
    "memory.low": "0",
    "memory.swap.max": "max",
    "pids.max": "max",
    "cpu.weight": "100",
    "cpu.max": "50000 200000",
    "cpuset.cpus": "",
}


def changed(resources: dict[str, Any], present: dict[str, str]) -> dict[str, str]:
    row = parse_object(json.dumps(resources).encode(), "resources")
    return cgroup_files(row, lambda name: present.get(name, ""))


@pytest.mark.parametrize(
    ("resources", "files"),
    [
        ({}, {}),
        ({"memory": {"limit": 0}, "cpu": {"quota": 0, "shares": 0}, "pids": {"limit": 0}}, {}),
        ({"cpu": {"quota": 100_000}}, {"cpu.max": "100000 200000"}),
        ({"cpu": {"quota": -1}}, {"cpu.max": "max 200000"}),
        ({"cpu": {"period": 10_000}}, {"cpu.max": "50000 10000"}),
        ({"cpu": {"shares": 1 << 40}}, {"cpu.weight": "10000"}),
        ({"cpu": {"shares": 1}}, {"cpu.weight": "1"}),
        ({"memory": {"swap": 100}}, {"memory.swap.max": "36"}),
        ({"memory": {"swap": 100, "limit": 90}}, {"memory.swap.max": "10", "memory.max": "90"}),
        ({"memory": {"swap": 10}}, {"memory.swap.max": "0"}),
        ({"unified": {"hugetlb.2MB.max": "0"}}, {"hugetlb.2MB.max": "0"}),
        ({"devices": [{"allow": True}], "blockIO": {"weight": 3}}, {}),
    ],
)
def test_what_is_not_named_stays(resources: dict[str, Any], files: dict[str, str]) -> None:
    assert changed(resources, MAX | {"memory.max": "64\n"}) == files


def test_without_a_limit_all_of_swap_is_meant() -> None:
    assert changed({"memory": {"swap": 100}}, MAX) == {"memory.swap.max": "100"}


_VALUE = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers())
_GROUP = st.dictionaries(
    st.sampled_from(
        ["limit", "swap", "reservation", "shares", "quota", "period", "cpus", "mems", "memory.max"]
    ),
    _VALUE,
)


@given(
    st.dictionaries(st.sampled_from(["memory", "cpu", "pids", "unified"]), _GROUP | _VALUE),
    st.dictionaries(st.sampled_from(list(MAX)), st.text(max_size=12)),
)
def test_any_resources_are_understood_or_refused(
    resources: dict[str, Any], present: dict[str, str]
) -> None:
    with contextlib.suppress(CallerError):
        for name, value in changed(resources, present).items():
            assert "/" not in name
            assert isinstance(value, str)


@pytest.fixture
def cgroup(tmp_path: Path) -> Cgroup:
    """Files that take what is written to them, but for cpuset.mems, which cannot be written."""
    for name, value in MAX.items():
        (tmp_path / name).write_text(value)
    (tmp_path / "cpuset.mems").symlink_to("/proc/version")  # EACCES, EPERM or EIO; never written
    return Cgroup(str(tmp_path))


def content(cgroup: Cgroup) -> dict[str, str]:
    return {name: (Path(cgroup.path) / name).read_text() for name in MAX}


def test_an_update_writes_what_is_named(cgroup: Cgroup) -> None:
    cgroup.update({"memory.max": "900", "pids.max": "100"})
    assert content(cgroup) == MAX | {"memory.max": "900", "pids.max": "100"}


def test_a_refusal_names_the_file_and_sets_back_what_came_before(cgroup: Cgroup) -> None:
    files = {"memory.max": "900", "cpu.weight": "777", "cpuset.mems": "9", "pids.max": "555"}
    with pytest.raises(VmcellError, match=r"set cpuset\.mems to '9': "):
        cgroup.update(files)
    assert content(cgroup) == MAX


def test_a_file_that_is_not_there_is_refused_before_anything_is_killed(cgroup: Cgroup) -> None:
    with pytest.raises(CallerError, match=r"set hugetlb\.1GB\.max to '0': No such file"):
        cgroup.update({"memory.max": "1", "hugetlb.1GB.max": "0"})
    assert content(cgroup) == MAX


def test_a_kernel_without_swap_keeps_to_any_limit_of_it(cgroup: Cgroup) -> None:
    (Path(cgroup.path) / "memory.swap.max").unlink()
    cgroup.update({"memory.swap.max": "5", "memory.max": "900"})
    assert (Path(cgroup.path) / "memory.max").read_text() == "900"


class Children:
    """Stands for the agent's errands: does the work at once, and tells what there was."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(
        self, what: str, work: Callable[[], bytes], done: Callable[[bytes], None], *, seconds: float
    ) -> None:
        self.asked.append(what)
        done(work())


@pytest.mark.parametrize(
    ("resources", "is_written"),
    [
        ({}, False),
        ({"devices": [{"allow": False, "access": "rwm"}]}, False),
        ({"memory": {"limit": -1}, "cpu": {"quota": 50_000}}, False),
        ({"memory": {"limit": -1}, "pids": {"limit": 900}}, True),
        # What is asked of a file that keeps nothing is done each time.
        ({"unified": {"memory.reclaim": "1"}}, True),
    ],
)
def test_limits_that_hold_already_cost_no_child(
    cgroup: Cgroup, resources: dict[str, Any], is_written: bool
) -> None:
    (Path(cgroup.path) / "memory.reclaim").touch()
    children, answers = Children(), list[VmcellError | None]()
    limits = Limits(children, cgroup, "container 'c1'")  # type: ignore[arg-type]  # a double
    limits.update(json.dumps(resources).encode(), answers.append)
    assert answers == [None]
    assert bool(children.asked) == is_written
    expected = "900" if "pids" in resources else "max"
    assert content(cgroup) == MAX | {"pids.max": expected}


@pytest.mark.root
def test_updates_of_a_container(agent: AgentUnderTest) -> None:
    """The kernel's own limits are shown in a guest; here, what becomes of the call."""
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()

    def update(resources: bytes, container_id: str = "c1") -> None:
        request = messages.UpdateContainerRequest(
            container_id=container_id, resources_json=resources
        )
        agent.client.call("UpdateContainer", request)

    update(b"{}")
    for resources, words in (
        (b"", "resources is not JSON"),
        (b"[]", "resources must be an object"),
        (b'{"memory": 3}', "resources.memory must be an object"),
        (b'{"memory": {"limit": "1"}}', "resources.memory.limit must be a whole number"),
        (b'{"memory": {"limit": 99999999999999999999}}', "must be -1 to"),
        (b'{"unified": {"../x": "1"}}', "no file of cgroup v2"),
        (b'{"unified": {"cgroup.procs": "1"}}', "no file of cgroup v2"),
        (b'{"unified": {"memory.nonsense": "1"}}', "set memory.nonsense to '1'"),
    ):
        with pytest.raises(VmcellError) as error:
            update(resources)
        assert words in str(error.value)
        assert error.value.code == "invalid_argument"
    with pytest.raises(VmcellError, match="no container 'c2'"):
        update(b"{}", "c2")
    init.signal(9)
    init.wait()
    with pytest.raises(VmcellError, match="has ended"):
        update(b"{}")
