"""Live directories in a container's root: the calls a forked child makes, in a namespace of a test.

A directory stands in for the share, since this kernel has no virtio-fs device; the share itself is
tested with a real one in the vm lane.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent_harness import AgentUnderTest, container_spec, process_spec

from vmcell_protos.errors import VmcellError

pytestmark = pytest.mark.root

FOLDERS = [
    os.fspath(Path(__file__).resolve().parents[2] / name) for name in ("protos", "guest-agent")
]
CHILD = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
share, root, rows = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
from vmcell_agent import abi, containerfs, syscalls
from vmcell_agent.mountoptions import parse_mount
mounts = tuple(parse_mount(d, "virtiofs", o, "m", source=s) for d, s, o in rows)
syscalls.unshare(abi.CLONE_NEWNS)
trees = containerfs.clone_trees(mounts, shared_memory="", live_share=share)
containerfs.enter_root(root, 0)
containerfs.mount_all(mounts, trees)
syscalls.mount("proc", "/proc", "proc")
found = {}
for row in mounts:
    place = row.destination
    file = place if os.path.isfile(place) else f"{place}/file"
    try:
        with open(file, "a") as opened:
            opened.write("+")
        said = "written"
    except OSError as error:
        said = os.strerror(error.errno)
    with open(file) as opened:
        found[place] = [opened.read(), said]
with open("/proc/self/mountinfo") as file:
    table = [line.split() for line in file]
left = [fd for fd in trees.values() if os.path.exists(f"/proc/self/fd/{fd}")]
print(json.dumps({"found": found, "mounts": {row[4]: row[5] for row in table}, "left": left}))
"""


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """What the host shares: two directories, the second with a mount of its own, and a file."""
    share = tmp_path / "share"
    for name in ("0", "1/below"):
        (share / name).mkdir(parents=True)
    for name in ("0/file", "1/file", "2"):
        (share / name).write_text(f"{name} ")
    (tmp_path / "root/proc").mkdir(parents=True)
    return share


def enter(share: Path, *rows: tuple[str, str, list[str]]) -> dict[str, Any]:
    """What a container with these (destination, source, options) finds."""
    words = [json.dumps(FOLDERS), os.fspath(share), os.fspath(share.parent / "root")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, *words, json.dumps(rows)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_directories_and_files_are_where_the_spec_wants_them(share: Path) -> None:
    result = enter(
        share,
        ("/deep/data", "0", ["rbind", "rprivate"]),
        ("/again", "0", ["rbind", "ro", "noexec"]),
        ("/etc/a-file", "2", ["bind"]),
    )
    assert result["found"] == {
        "/deep/data": ["0/file +", "written"],
        "/again": ["0/file +", "Read-only file system"],
        "/etc/a-file": ["2 +", "written"],
    }
    assert (share / "0/file").read_text() == "0/file +"
    assert (share / "2").read_text() == "2 +"
    flags = {place: set(words.split(",")) for place, words in result["mounts"].items()}
    assert {"rw", "nosuid", "nodev"} <= flags["/deep/data"]
    assert {"ro", "nosuid", "nodev", "noexec"} <= flags["/again"]
    assert set(flags) == {"/", "/proc", "/deep/data", "/again", "/etc/a-file"}, "no way to the rest"
    assert result["left"] == []


def test_a_link_of_the_image_does_not_lead_out(share: Path) -> None:
    root = share.parent / "root"
    outside = share.parent / "outside"
    outside.mkdir()
    (root / "data").symlink_to(outside)
    result = enter(share, ("/data", "1", []))
    assert result["found"]["/data"][1] == "written"
    assert not os.listdir(outside)


def test_a_number_the_host_does_not_share_is_an_error(share: Path) -> None:
    with pytest.raises(AssertionError, match="take the host's live directories: No such file"):
        enter(share, ("/data", "7", []))


def live(agent: AgentUnderTest, script: str, *rows: tuple[str, str, list[str]]) -> bytes:
    """What a container with these (destination, source, options) prints."""
    spec = container_spec(process_spec("sh", "-c", script))
    spec["mounts"] += [
        {"destination": place, "type": "virtiofs", "source": source, "options": options}
        for place, source, options in rows
    ]
    init = agent.create(spec, upper="").start()
    out = init.read()
    assert init.wait() == 0, init.read("stderr")
    return out


def test_containers_of_an_agent_share_what_the_host_changes(agent: AgentUnderTest) -> None:
    directory = agent.directory / "share/0"
    directory.mkdir()
    (directory / "file").write_text("first")
    script = "cat /data/file; echo -n second > /data/file"
    assert live(agent, script, ("/data", "0", ["rbind", "rprivate", "rw"])) == b"first"
    assert (directory / "file").read_text() == "second"
    (agent.directory / "share/1").mkdir()  # comes while the agent runs
    script = "cat /data/file; echo x > /data/file || cat /data/file; ls -A /other"
    rows = ("/data", "0", ["ro"]), ("/other", "1", [])
    assert live(agent, script, *rows) == b"secondsecond"
    assert sorted(os.listdir(directory)) == ["file"]


def test_a_container_whose_directory_is_not_shared_does_not_start(agent: AgentUnderTest) -> None:
    with pytest.raises(VmcellError, match="take the host's live directories: No such file"):
        live(agent, "true", ("/data", "5", []))
    with pytest.raises(VmcellError, match="virtiofs takes a number"):
        live(agent, "true", ("/data", "../state", []))
