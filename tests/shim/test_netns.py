"""Which network namespace a spec means, and one made, entered and removed."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from pod_namespaces import namespaces

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.netns import (
    NERDCTL_ANNOTATION,
    in_namespace,
    make_namespace,
    open_namespace,
    remove_namespace,
    wanted_namespace,
)


def spec(*rows: dict[str, Any], path: Any = None) -> dict[str, Any]:
    """A spec with these network namespaces; `path` is the annotation's."""
    return {
        "linux": {"namespaces": [{"type": "pid"}, *rows]},
        "annotations": {NERDCTL_ANNOTATION: path} if path else {},
    }


def test_a_new_namespace_is_asked_for() -> None:
    assert wanted_namespace(spec({"type": "network"})) == ""
    assert wanted_namespace(spec({"type": "network", "path": ""})) == ""


@pytest.mark.parametrize("whole", [{}, {"linux": {}}, spec(), {"linux": {"namespaces": None}}])
def test_no_namespace_is_the_hosts_network(whole: dict[str, Any]) -> None:
    with pytest.raises(CallerError, match="asks for the host's network") as caught:
        wanted_namespace(whole)
    assert caught.value.code == "unimplemented"


@pytest.mark.parametrize(
    "whole",
    [
        spec({"type": "network", "path": 5}),
        spec({"type": "network"}, path=["x"]),
        {"linux": {"namespaces": ["network"]}},
    ],
)
def test_a_path_that_is_none(whole: dict[str, Any]) -> None:
    with pytest.raises(CallerError):
        wanted_namespace(whole)


@pytest.mark.root
def test_the_path_and_the_annotation() -> None:
    with namespaces("first", "second") as (first, second):
        row = {"type": "network", "path": first.path}
        assert wanted_namespace(spec(row)) == first.path
        assert wanted_namespace(spec(row, path=second.path)) == first.path
        assert wanted_namespace(spec({"type": "network"}, path=second.path)) == second.path
        assert wanted_namespace(spec(path=second.path)) == second.path


@pytest.mark.root
def test_the_hosts_namespace_by_any_name(tmp_path: Path) -> None:
    link = tmp_path / "host"
    link.symlink_to("/proc/self/ns/net")
    for path in ("/proc/self/ns/net", str(link)):
        with pytest.raises(CallerError, match="is the host's") as caught:
            wanted_namespace(spec({"type": "network", "path": path}))
        assert caught.value.code == "unimplemented"
    # Some machines hide PID 1 from root, too.
    with pytest.raises(CallerError, match=r"is the host's|Permission denied"):
        wanted_namespace(spec({"type": "network", "path": "/proc/1/ns/net"}))
    with pytest.raises(CallerError, match="cannot be used: No such file"):
        wanted_namespace(spec({"type": "network", "path": str(tmp_path / "none")}))


@pytest.mark.root
def test_made_entered_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "netns")
    make_namespace(path)
    with pytest.raises(HostError, match="File exists"):
        make_namespace(path)
    fd = open_namespace(path)
    try:
        names = in_namespace(fd, lambda: [name for _, name in socket.if_nameindex()])
        assert "lo" in names
        assert "eth0" not in names
        # Loopback is up: a listener can be dialled.
        listener = in_namespace(fd, lambda: socket.create_server(("127.0.0.1", 0)))
        with listener:
            address = listener.getsockname()
            in_namespace(fd, lambda: socket.create_connection(address, timeout=10)).close()
            with pytest.raises(OSError):
                socket.create_connection(address, timeout=10)
    finally:
        os.close(fd)
    for _ in range(2):
        remove_namespace(path)
    assert not os.path.exists(path)
    assert path not in Path("/proc/self/mounts").read_text()


@pytest.mark.root
def test_a_namespace_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise HostError("no loopback")

    monkeypatch.setattr("vmcell_shim.netns._settle", refuse)
    with pytest.raises(HostError, match="no loopback"):
        make_namespace(str(tmp_path / "netns"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(HostError, match="No such file"):
        make_namespace(str(tmp_path / "none" / "netns"))


@pytest.mark.root
def test_what_fails_inside_is_raised_outside_and_the_thread_is_gone() -> None:
    def fail() -> None:
        raise KeyError("inside")

    before = os.readlink("/proc/thread-self/ns/net")
    with namespaces("pod") as [pod]:
        assert pod.inside(lambda: os.readlink("/proc/thread-self/ns/net")) != before
        with pytest.raises(KeyError, match="inside"):
            pod.inside(fail)
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert not [thread for thread in threading.enumerate() if thread.name == "netns"]


def test_a_descriptor_that_is_no_namespace() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(HostError, match="cannot enter a network namespace"):
            in_namespace(fd, lambda: None)
    finally:
        os.close(fd)


def test_a_fifo_does_not_hold_us_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CallerError, match="is no network namespace"):
        open_namespace(str(tmp_path / "fifo"))
