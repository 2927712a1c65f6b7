"""Connections to a pod's loopback, carried into its guest.

For `kubectl port-forward` containerd enters the pod's network namespace and dials localhost, where
nobody listens: the processes are in the guest. So the shim listens there, a NAT rule brings every
TCP connection over the namespace's loopback to it, and each is joined to the guest's own loopback
at the port that was meant. Source: nft(8) § NAT statements, SO_ORIGINAL_DST in
<linux/netfilter_ipv4.h> and <linux/netfilter_ipv6/ip6_tables.h>.
"""

from __future__ import annotations

import os
import select
import socket
import threading

from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_shim.netns import in_namespace, open_namespace
from vmcell_shim.relay import relay
from vmcell_shim.spawn import run_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_shim.journal import Journal

MAX_CONNECTIONS = 64
_BACKLOG = 64
_NFT_S = 10.0
_CLOSE_S = 5.0
_TABLE = "vmcell_forward"
# One number for both families, at the level of the protocol.
_SO_ORIGINAL_DST = 80
_SOCKADDR_BYTES = {socket.AF_INET: 16, socket.AF_INET6: 28}
_LEVELS = {socket.AF_INET: socket.IPPROTO_IP, socket.AF_INET6: socket.IPPROTO_IPV6}
_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_MATCHES = {socket.AF_INET: "ip daddr 127.0.0.0/8", socket.AF_INET6: "ip6 daddr ::1"}
# Declaring the table first makes deleting it right whether it is there or not.
_NO_RULES = f"table inet {_TABLE}\ndelete table inet {_TABLE}\n"


class PortForward:
    """Owns the listeners, its threads and the rules in the namespace until close()."""

    def __init__(
        self,
        namespace: str,
        listeners: list[socket.socket],
        dial: Callable[[int], socket.socket],
        journal: Journal,
    ) -> None:
        self._namespace = namespace
        self._listeners = listeners
        self._dial = dial
        self._journal = journal
        self._changed = threading.Condition()
        self._connections = 0
        self._closed = False
        # Never read, so every thread sees it; the other wakes the listening thread alone.
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fewer = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listening = threading.Thread(target=self._listen, name="port-forward", daemon=True)
        self._listening.start()

    def close(self) -> None:
        """Ends all connections and takes the rules away, also when the namespace has gone.
        Idempotent. HostError when something stays behind."""
        with self._changed:
            first, self._closed = not self._closed, True
        if not first:
            return
        os.eventfd_write(self._stop, 1)
        self._listening.join(_CLOSE_S)
        for listener in self._listeners:
            listener.close()
        with self._changed:
            ended = self._changed.wait_for(lambda: not self._connections, _CLOSE_S)
        # Not before: without the rules the kernel translates no address any more, and a client
        # would never hear the end of its connection.
        remove_rules(self._namespace)
        if not ended:
            raise HostError(f"forwarded connections have not ended within {_CLOSE_S:g} s")
        os.close(self._stop)
        os.close(self._fewer)

    def _listen(self) -> None:
        while True:
            poll = select.poll()
            for fd in (self._stop, self._fewer):
                poll.register(fd, select.POLLIN)
            if self._connections < MAX_CONNECTIONS:
                for listener in self._listeners:
                    poll.register(listener, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                return
            if self._fewer in ready:
                os.eventfd_read(self._fewer)
            for listener in self._listeners:
                if listener.fileno() in ready:
                    self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has hung up again
        with self._changed:
            self._connections += 1
        threading.Thread(
            target=self._carry, args=(client,), name="port-forward-connection", daemon=True
        ).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            with client:
                port = _meant_port(client)
                with self._dial(port) as guest:
                    relay(client, guest, self._stop)
        except (VmcellError, OSError) as error:
            self._journal.info(f"a forwarded connection ended: {error}")
        finally:
            with self._changed:
                self._connections -= 1
                os.eventfd_write(self._fewer, 1)
                self._changed.notify_all()


def open_port_forward(
    namespace: str, dial: Callable[[int], socket.socket], journal: Journal
) -> PortForward | None:
    """Listens in the namespace at the path `namespace`; the caller closes the result.

    `dial` answers with a stream to a TCP port of the guest's loopback, or raises VmcellError. Where
    the host has no nft or its kernel no NAT: None and a line in the journal; the pod works without.
    """
    listeners: list[socket.socket] = []
    try:
        fd = open_namespace(namespace)
        try:
            listeners = in_namespace(fd, _loopback_listeners)
            in_namespace(fd, lambda: _nft(_NO_RULES + _rules(listeners)))
        finally:
            os.close(fd)
        return PortForward(namespace, listeners, dial, journal)
    except (VmcellError, OSError) as error:
        for listener in listeners:
            listener.close()
        journal.warning(f"no port-forward for this pod: {error}")
        return None


def remove_rules(namespace: str) -> None:
    """Takes the rules away; where the namespace has gone there is nothing to do. May be called
    again, also for a namespace that never had any. Raises HostError."""
    try:
        fd = open_namespace(namespace)
    except CallerError:
        return
    try:
        in_namespace(fd, lambda: _nft(_NO_RULES))
    finally:
        os.close(fd)


def _loopback_listeners() -> list[socket.socket]:
    """One for each family the namespace has, on a port of the kernel's choice."""
    listeners: list[socket.socket] = []
    for family, address in _LOOPBACKS:
        try:
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            continue  # a kernel without IPv6
        try:
            listener.bind((address, 0))
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            continue  # IPv6 switched off in this namespace
        listeners.append(listener)
    if not listeners:
        raise HostError("no address of its namespace's loopback can be bound")
    return listeners


def _rules(listeners: list[socket.socket]) -> str:
    rules = "".join(
        f'oif "lo" {_MATCHES[listener.family]} meta l4proto tcp redirect to :{port}\n'
        for listener in listeners
        for port in [listener.getsockname()[1]]
    )
    chain = f"chain output {{\ntype nat hook output priority -100; policy accept;\n{rules}}}\n"
    return f"table inet {_TABLE} {{\n{chain}}}\n"


def _nft(script: str) -> None:
    try:
        status, output = run_program(["nft", "-f", "-"], stdin=script.encode(), timeout_s=_NFT_S)
    except FileNotFoundError as error:
        raise HostError("the program nft is missing; apt-get install nftables") from error
    if status:
        first = output.splitlines()[0] if output else f"status {status}"
        raise HostError(f"nft refuses the rules of a pod's loopback: {first}")


def _meant_port(client: socket.socket) -> int:
    """The port that was dialled, before the rule changed it."""
    family = client.family
    address = client.getsockopt(_LEVELS[family], _SO_ORIGINAL_DST, _SOCKADDR_BYTES[family])
    return int.from_bytes(address[2:4], "big")
