"""Connections to a namespace's loopback that arrive in the guest, which is played by the test."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pod_namespaces import Namespace, namespaces

from vmcell_protos.errors import GuestError
from vmcell_shim import port_forward
from vmcell_shim.journal import Journal
from vmcell_shim.port_forward import PortForward, open_port_forward, remove_rules

pytestmark = pytest.mark.root


class FakeGuest:
    """dial() for the forward: port 8080 echoes until the end of what it is sent, then says which
    port it is; any other port refuses."""

    def __init__(self) -> None:
        self.dialled: list[int] = []

    def dial(self, port: int) -> socket.socket:
        self.dialled.append(port)
        if port != 8080:
            raise GuestError(f"nothing listens on port {port}")
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return ours

    @staticmethod
    def _serve(sock: socket.socket) -> None:
        with sock, suppress(BrokenPipeError):
            while data := sock.recv(65536):
                sock.sendall(data)
            sock.sendall(b"8080")


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with namespaces("pod") as [namespace]:
        yield namespace


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal("", "test")
    made.attach(str(tmp_path / "log"))
    return made


@contextmanager
def forwarding(pod: Namespace, guest: FakeGuest, journal: Journal) -> Iterator[PortForward]:
    forward = open_port_forward(pod.path, guest.dial, journal)
    assert forward is not None
    try:
        yield forward
    finally:
        forward.close()


def dial(pod: Namespace, address: str, port: int) -> socket.socket:
    """As containerd does it: enter the namespace and connect."""
    return pod.inside(lambda: socket.create_connection((address, port), timeout=10))


def rules(pod: Namespace) -> str:
    return pod.inside(lambda: subprocess.check_output(["nft", "list", "ruleset"], text=True))


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1"])
def test_a_connection_arrives_at_the_port_that_was_meant(
    pod: Namespace, journal: Journal, address: str
) -> None:
    guest = FakeGuest()
    with forwarding(pod, guest, journal), dial(pod, address, 8080) as client:
        client.sendall(b"through")
        assert client.recv(7, socket.MSG_WAITALL) == b"through"
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"8080"
    assert guest.dialled == [8080]


def test_a_refusing_port_ends_the_connection(
    pod: Namespace, journal: Journal, tmp_path: Path
) -> None:
    guest = FakeGuest()
    with forwarding(pod, guest, journal):
        for port in (1, 65535):
            with dial(pod, "127.0.0.1", port) as client:
                assert client.recv(1) == b""
    assert guest.dialled == [1, 65535]
    assert "nothing listens on port 65535" in (tmp_path / "log").read_text()


def test_the_listeners_own_port_is_no_loop(pod: Namespace, journal: Journal) -> None:
    """Who finds it by scanning gets the guest's port of that number like any other."""
    guest = FakeGuest()
    with forwarding(pod, guest, journal):
        text = rules(pod)
        port = int(text.split("redirect to :")[1].split()[0])
        with dial(pod, "127.0.0.1", port) as client:
            assert client.recv(1) == b""
    assert guest.dialled == [port]


def test_no_more_connections_than_the_limit(
    pod: Namespace, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_forward, "MAX_CONNECTIONS", 2)
    guest = FakeGuest()
    with forwarding(pod, guest, journal):
        clients = [dial(pod, "127.0.0.1", 8080) for _ in range(3)]
        try:
            for client in clients[:2]:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            clients[2].sendall(b"y")
            clients[2].settimeout(0.5)
            with pytest.raises(TimeoutError):
                clients[2].recv(1)
            clients[0].close()  # makes room
            clients[2].settimeout(10)
            assert clients[2].recv(1) == b"y"
        finally:
            for client in clients:
                client.close()


def test_close_ends_connections_and_takes_rules_and_descriptors_away(
    pod: Namespace, journal: Journal
) -> None:
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with forwarding(pod, FakeGuest(), journal) as forward:
        client = dial(pod, "127.0.0.1", 8080)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        assert "redirect to" in rules(pod)
        forward.close()
        forward.close()
        assert client.recv(1) == b""
        client.close()
        assert rules(pod) == ""
        with pytest.raises(ConnectionRefusedError):
            dial(pod, "127.0.0.1", 8080)
    for thread in threading.enumerate():
        if thread.name.startswith("port-forward"):
            thread.join(10)
    assert threading.active_count() <= threads + 1  # the fake guest's
    assert len(os.listdir("/proc/self/fd")) <= fds + 1


def test_rules_after_a_crash_go_by_the_namespace_alone(pod: Namespace, journal: Journal) -> None:
    with forwarding(pod, FakeGuest(), journal):
        for _ in range(2):
            remove_rules(pod.path)
            assert rules(pod) == ""
        # What a crashed shim left is no obstacle either.
        with forwarding(pod, FakeGuest(), journal), dial(pod, "127.0.0.1", 8080) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"


def test_close_after_the_namespace(pod: Namespace, journal: Journal) -> None:
    with forwarding(pod, FakeGuest(), journal):
        subprocess.run(["ip", "netns", "delete", pod.name], check=True)
    remove_rules(pod.path)


def test_other_traffic_and_other_rules_are_left_alone(pod: Namespace, journal: Journal) -> None:
    """Rules of a CNI plugin stay, and what does not go to the loopback is not redirected."""
    pod.ip("address add 192.0.2.9/32 dev lo")
    script = "table ip cni {\nchain x {\n}\n}\n"
    pod.inside(lambda: subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True))
    guest = FakeGuest()
    with forwarding(pod, guest, journal), pytest.raises(ConnectionRefusedError):
        dial(pod, "192.0.2.9", 8080)
    assert guest.dialled == []
    assert "table ip cni" in rules(pod)


def test_without_ipv6(pod: Namespace, journal: Journal) -> None:
    def switch_off() -> None:
        # /proc/sys/net shows the namespace of the thread that opens it.
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")

    pod.inside(switch_off)
    with forwarding(pod, FakeGuest(), journal), dial(pod, "127.0.0.1", 8080) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"


def test_without_nft_the_pod_goes_on(
    pod: Namespace, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert open_port_forward(pod.path, FakeGuest().dial, journal) is None
    assert "no port-forward for this pod: the program nft is missing" in (
        (tmp_path / "log").read_text()
    )
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_kernel_that_refuses_the_rules(
    pod: Namespace, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_forward, "_rules", lambda listeners: "no rules at all\n")
    assert open_port_forward(pod.path, FakeGuest().dial, journal) is None
    assert "no port-forward for this pod: nft refuses" in (tmp_path / "log").read_text()
