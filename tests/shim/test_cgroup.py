"""The pod's cgroup on the host: names, limits, and the life of one in the real hierarchies."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim import cgroup
from vmcell_shim.cgroup import Hierarchy, HostCgroup, create_cgroup, find_hierarchies
from vmcell_shim.cgroup_limits import HostLimits, host_limits, parse_cgroups_path

POD = "kubepods-burstable-pod1234_5678.slice"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", ""),
        ("/default/c1", "default/c1"),
        ("default/c1", "default/c1"),
        ("//kubepods//besteffort/podX/id/", "kubepods/besteffort/podX/id"),
        ("/a:b:c/d", "a:b:c/d"),
        (
            f"{POD}:cri-containerd:abc",
            f"kubepods.slice/kubepods-burstable.slice/{POD}/cri-containerd-abc.scope",
        ),
        ("system.slice:nerdctl:abc", "system.slice/nerdctl-abc.scope"),
        (":nerdctl:abc", "system.slice/nerdctl-abc.scope"),
        ("-.slice:runc:abc", "runc-abc.scope"),
        ("user.slice:runc:box.slice", "user.slice/box.slice"),
    ],
)
def test_forms_of_cgroups_path(text: str, path: str) -> None:
    assert parse_cgroups_path(text) == path


@pytest.mark.parametrize(
    "text",
    [
        *("/", "//", "/a/../b", "..", "/a/./b", "/a/" + "x" * 256, "/a\nb", "a.slice:b:"),
        *("a.slice:..:/x", "a:b:c", ".slice:b:c", "a--b.slice:b:c", "a-.slice:b:c"),
        *("../../x.slice:b:c", "a.slice:b:../c", "-.slice:..:.slice/../x"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(text: str) -> None:
    with pytest.raises(CallerError, match=r"linux\.cgroupsPath"):
        parse_cgroups_path(text)


PATHS = st.text(max_size=60) | st.text(alphabet="ab-./:\n", max_size=40)


@given(PATHS)
def test_a_path_stays_below_the_root(text: str) -> None:
    try:
        path = parse_cgroups_path(text)
    except CallerError:
        return
    assert os.path.normpath("/top/" + path) == "/top/" + path if path else not text
    assert ".." not in path.split("/")


@given(st.lists(st.text(alphabet="abc_", min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_slice_stands_in_the_slices_its_name_says(words: list[str]) -> None:
    path = parse_cgroups_path("-".join(words) + ".slice:cri:1")
    *slices, scope = path.split("/")
    assert scope == "cri-1.scope"
    assert len(slices) == len(words)
    assert [name.count("-") for name in slices] == list(range(len(words)))


def spec(**resources: object) -> dict[str, object]:
    return {"linux": {"resources": resources}}


def test_limits_of_a_spec() -> None:
    row = host_limits(
        spec(
            memory={"limit": 256 << 20},
            cpu={"shares": 512, "quota": 150_000, "period": 100_000, "cpus": "0-1", "mems": "0"},
            pids={"limit": 10},
        ),
        guest_memory_mib=352,
        sandbox=False,
    )
    assert row == HostLimits(
        memory_bytes=(352 + 64 + 2) << 20,
        cpu_shares=512,
        cpu_quota_us=150_000,
        cpu_period_us=100_000,
        cpus="0-1",
        mems="0",
        tasks=512,
    )


def test_without_limits_the_machine_has_its_own() -> None:
    own = HostLimits(memory_bytes=(2 * 512 + 64 + 4) << 20, tasks=512)
    none = spec(memory={"limit": -1}, cpu={"quota": -1}, pids={"limit": 0})
    assert host_limits(none, guest_memory_mib=512, sandbox=False) == own
    assert host_limits({}, guest_memory_mib=512, sandbox=False) == own
    # "No limit" as Kubernetes writes it.
    huge = spec(memory={"limit": (1 << 63) - 4096})
    assert host_limits(huge, guest_memory_mib=512, sandbox=False) == own
    pause = spec(cpu={"shares": 2}, memory={"limit": 1 << 20})
    assert host_limits(pause, guest_memory_mib=512, sandbox=True) == HostLimits()
    with pytest.raises(CallerError, match="shares"):
        host_limits(spec(cpu={"shares": "x"}), guest_memory_mib=1, sandbox=False)


@pytest.mark.parametrize(("shares", "weight"), [(0, 1), (2, 1), (1024, 39), (262144, 10000)])
def test_shares_and_weight(shares: int, weight: int) -> None:
    assert cgroup.weight_of_shares(shares) == weight


LIMITS = HostLimits(
    memory_bytes=128 << 20, cpu_shares=1024, cpu_quota_us=50_000, cpus="0", tasks=100
)
V1_FILES = {
    "memory.limit_in_bytes": "134217728",
    "cpu.shares": "1024",
    "cpu.cfs_period_us": "100000",
    "cpu.cfs_quota_us": "50000",
    "cpuset.cpus": "0",
    "pids.max": "100",
}
V2_FILES = {
    "memory.max": "134217728",
    "cpu.weight": "39",
    "cpu.max": "50000 100000",
    "cpuset.cpus": "0",
    "pids.max": "100",
}


@pytest.mark.parametrize(("version", "files"), [(1, V1_FILES), (2, V2_FILES)])
def test_what_is_written_where(tmp_path: Path, version: int, files: dict[str, str]) -> None:
    """On files of our own; a real kernel has its turn below."""
    (tmp_path / "a").mkdir()
    for name in files:
        (tmp_path / "a" / name).touch()
    (tmp_path / "a/cgroup.controllers").write_text("cpu cpuset memory pids\n")
    controllers = frozenset({"cpu", "cpuset", "memory", "pids"})
    row = Hierarchy(mount_point=str(tmp_path), version=version, controllers=controllers)
    group = HostCgroup("a", (row,))
    group.set_limits(LIMITS)
    assert group.missing == ()
    assert {name: (tmp_path / "a" / name).read_text() for name in files} == files
    (tmp_path / "a/cgroup.controllers").write_text("memory\n")
    group.set_limits(LIMITS)
    assert group.missing == (() if version == 1 else ("pids", "cpu", "cpuset"))


MOUNTINFO = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / {0}/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:29 / {0}/elsewhere/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / {0}/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / {0}/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


def test_hierarchies_of_a_hybrid_host(tmp_path: Path) -> None:
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.controllers").write_text("\n")
    (tmp_path / "mountinfo").write_text(MOUNTINFO.format(tmp_path))
    rows = find_hierarchies(str(tmp_path / "mountinfo"))
    found = [(Path(row.mount_point).name, row.version, row.controllers) for row in rows]
    assert found == [
        ("cpu,cpuacct", 1, frozenset({"cpu", "cpuacct"})),
        ("systemd", 1, frozenset({"xattr", "name=systemd"})),
        ("unified", 2, frozenset()),
    ]


def test_a_host_without_cgroups(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("22 27 0:21 / /proc rw - proc proc rw\n")
    with pytest.raises(HostError, match="no cgroup hierarchy"):
        find_hierarchies(str(tmp_path / "mountinfo"))
    with pytest.raises(HostError, match="absent"):
        find_hierarchies(str(tmp_path / "absent"))


@pytest.fixture
def place() -> Iterator[str]:
    """A parent of the test's own in every hierarchy of this host."""
    parent = f"vmcell-test-{os.getpid()}"
    try:
        yield f"{parent}/pod/c1"
    finally:
        for path in (f"{parent}/pod/c1", f"{parent}/pod", parent):
            cgroup.remove_cgroup(path, timeout_s=5)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def of_process(pid: int) -> set[str]:
    """The paths of a process, one per hierarchy that knows it."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.split(":", 2)[2] for line in lines}


def read(name: str, path: str) -> str:
    """A file of the cgroup, in whichever hierarchy it is."""
    for row in find_hierarchies():
        file = Path(row.directory(path)) / name
        if file.exists():
            return file.read_text().strip()
    raise FileNotFoundError(name)


@pytest.mark.root
def test_life_of_a_cgroup(place: str, sleeper: subprocess.Popen[bytes]) -> None:
    rows = find_hierarchies()
    group = create_cgroup(place, LIMITS)
    assert group.missing == ()
    assert all(Path(row.directory(place)).is_dir() for row in rows)
    group.join(sleeper.pid)
    assert of_process(sleeper.pid) == {f"/{place}"}
    assert cgroup.members(place) == {sleeper.pid}
    v2 = all(row.version == 2 for row in rows)
    for name, value in (V2_FILES if v2 else V1_FILES).items():
        assert read(name, place) == value, name
    group.set_limits(HostLimits(cpu_quota_us=20_000, cpu_period_us=50_000))
    assert read("cpu.max" if v2 else "cpu.cfs_quota_us", place).startswith("20000")
    assert read("pids.max", place) == "100", "what is not named stays"
    with pytest.raises(HostError, match=f"processes in it: {sleeper.pid}"):
        cgroup.remove_cgroup(place, timeout_s=0)
    sleeper.kill()
    cgroup.remove_cgroup(place, timeout_s=5)
    assert not any(Path(row.directory(place)).exists() for row in rows)
    cgroup.remove_cgroup(place, timeout_s=0)
    assert cgroup.members(place) == set()


@pytest.mark.root
def test_threads_go_along(place: str) -> None:
    script = (
        "import threading, sys\n"
        "for _ in range(5): threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print(1, flush=True); sys.stdin.read()"
    )
    words = ["python3", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        create_cgroup(place, HostLimits()).join(process.pid)
        tasks = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        assert len(tasks) == 6
        assert {path for task in tasks for path in of_process(task)} == {f"/{place}"}


@pytest.mark.root
def test_a_cgroup_of_somebody_else_is_refused(place: str, sleeper: subprocess.Popen[bytes]) -> None:
    create_cgroup(place, HostLimits()).join(sleeper.pid)
    for path in (place, os.path.dirname(place)):
        with pytest.raises(CallerError, match="is in use"):
            create_cgroup(path, HostLimits())
    assert cgroup.members(place) == {sleeper.pid}
    sleeper.kill()
    sleeper.wait()
    assert create_cgroup(place, HostLimits()).missing == (), "one that is left empty is taken over"


@pytest.mark.root
def test_an_impossible_limit_leaves_nothing(place: str) -> None:
    with pytest.raises(HostError, match=r"cannot write '4096'.*cpuset\.cpus"):
        create_cgroup(place, HostLimits(cpus="4096"))
    assert not any(Path(row.directory(place)).exists() for row in find_hierarchies())


@pytest.mark.root
def test_a_process_that_has_gone(place: str, sleeper: subprocess.Popen[bytes]) -> None:
    group = create_cgroup(place, HostLimits())
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(HostError, match="No such process"):
        group.join(sleeper.pid)


def test_the_root_is_nobodys_own() -> None:
    for attempt in (
        lambda: create_cgroup("", HostLimits()),
        lambda: cgroup.remove_cgroup("", timeout_s=0),
    ):
        with pytest.raises(CallerError, match="root of all cgroups"):
            attempt()
