"""The pool of network slots: TAPs made ahead, so that a create costs no netlink work.

TAPs are persistent and named by their number, so they outlive noded and are found again. Every
sandbox address is a permanent neighbour: the host never asks a guest by ARP, and a guest cannot
answer for another. The pool's own state is a set of free numbers; who holds a slot is written on
the container's labels.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmcell_api.egress import OPEN, Egress
from vmcell_api.node import conntrack, firewall
from vmcell_api.node.slot_plan import TAP_PREFIX, Slot, slot_at
from vmcell_protos.errors import HostError


class SlotPool:
    """Owns the TAPs and the nftables table. Thread-safe.

    `open()` makes what is missing; `close_all()` removes everything again (teardown only: TAPs and
    table stay when noded merely ends, because sandboxes outlive it).
    """

    def __init__(self, *, network: str, slot_count: int, nameservers: tuple[str, ...] = ()) -> None:
        self.network = network
        self._nameservers = nameservers
        self.slot_count = slot_count
        self._slots = {n: slot_at(network, n) for n in range(1, slot_count + 1)}
        self._free: list[int] = []
        # By TAP; one that is not named has the internet.
        self._policies: dict[str, Egress] = {}
        self._lock = threading.Lock()

    def open(self, taken: dict[int, Egress]) -> None:
        """Makes TAPs and table; `taken` maps slot numbers in use to what they may reach.

        A number above `slot_count` (the pool was larger once) is kept until it is released.
        Raises HostError.
        """
        with self._lock:
            for number in taken:
                self._slots.setdefault(number, slot_at(self.network, number))
            self._policies = {self._slots[number].tap: row for number, row in taken.items()}
            _make_taps(list(self._slots.values()))
            _enable_forwarding()
            firewall.apply(
                firewall.table_commands(
                    self.network, self._slots.values(), self._policies, self._nameservers
                )
            )
            numbers = range(1, self.slot_count + 1)
            self._free = [number for number in numbers if number not in taken]
            # An earlier noded may have died between a sandbox's end and this.
            conntrack.forget_all({self._slots[number].guest_address for number in self._free})

    @property
    def free_count(self) -> int:
        """How many sandboxes still fit."""
        with self._lock:
            return len(self._free)

    def at(self, number: int) -> Slot:
        """The slot of that number."""
        return self._slots[number]

    def claim(self, egress: Egress) -> Slot:
        """Takes a free slot; raises HostError (resource_exhausted) when all are in use."""
        with self._lock:
            if not self._free:
                raise HostError(
                    f"all {self.slot_count} sandbox slots of this node are in use; "
                    "try again when a sandbox has ended",
                    code="resource_exhausted",
                )
            # The oldest first: an answer of the router, a moment old, names nobody else's slot.
            slot = self._slots[self._free.pop(0)]
            try:
                self._set_egress(slot, egress)
            except HostError:
                self._free.append(slot.number)
                raise
            return slot

    def set_egress(self, number: int, egress: Egress) -> None:
        """Changes what a slot in use may reach; what it is connected to and may no more, ends."""
        with self._lock:
            slot = self._slots[number]
            self._set_egress(slot, egress)
            conntrack.forget_opened(slot.guest_address, unless=egress.permits)

    def cut(self, number: int) -> None:
        """Resets the host's connections to a slot whose machine has ended; raises HostError.

        A machine that is gone says no FIN, so nginx would hold its clients' streams.
        """
        conntrack.close_sockets(self._slots[number].guest_address)

    def release(self, number: int) -> None:
        """Gives a slot back, its connections forgotten, its policy the default one.

        A free slot stays free.
        """
        with self._lock:
            if number in self._free:
                return
            conntrack.close_sockets(self._slots[number].guest_address)
            conntrack.forget(self._slots[number].guest_address)
            self._set_egress(self._slots[number], OPEN)
            if number <= self.slot_count:
                self._free.append(number)

    def close_all(self) -> None:
        """Removes the table and every TAP of the naming scheme, in use or not."""
        with self._lock:
            firewall.apply(firewall.remove_commands())
            _remove_taps()
            self._free = []

    def _set_egress(self, slot: Slot, after: Egress) -> None:
        before = self._policies.get(slot.tap, OPEN)
        if before != after:
            firewall.apply(firewall.egress_commands(slot.tap, before, after))
            self._policies[slot.tap] = after


def _make_taps(slots: list[Slot]) -> None:
    try:
        with IPRoute() as netlink:
            present = {link.get_attr("IFLA_IFNAME"): link["index"] for link in netlink.get_links()}
            for slot in slots:
                _make_tap(netlink, slot, present.get(slot.tap))
    except (NetlinkError, OSError) as error:
        raise HostError(
            f"cannot make the sandbox network ({error}); noded needs root, /dev/net/tun and the "
            "kernel module tun"
        ) from error


def _make_tap(netlink: IPRoute, slot: Slot, index: int | None) -> None:
    if index is None:
        flags = {"no_pi": True, "vnet_hdr": True}
        netlink.link("add", ifname=slot.tap, kind="tuntap", mode="tap", ifr=flags)
        index = netlink.link_lookup(ifname=slot.tap)[0]
    netlink.link("set", index=index, address=slot.host_mac, state="up")
    Path(f"/proc/sys/net/ipv6/conf/{slot.tap}/disable_ipv6").write_text("1")
    # Only for its own address and only to the guest's: no guest learns the host's other addresses.
    Path(f"/proc/sys/net/ipv4/conf/{slot.tap}/arp_ignore").write_text("2")
    netlink.addr("replace", index=index, address=slot.host_address, prefixlen=31)
    netlink.neigh(
        "replace", dst=slot.guest_address, lladdr=slot.guest_mac, ifindex=index, state="permanent"
    )


def _remove_taps() -> None:
    try:
        with IPRoute() as netlink:
            for link in netlink.get_links():
                name = link.get_attr("IFLA_IFNAME")
                if name.startswith(TAP_PREFIX) and name[len(TAP_PREFIX) :].isdigit():
                    netlink.link("del", index=link["index"])
    except (NetlinkError, OSError) as error:
        raise HostError(f"cannot remove the sandbox network: {error}") from error


def _enable_forwarding() -> None:
    path = Path("/proc/sys/net/ipv4/ip_forward")
    try:
        if path.read_text().strip() != "1":
            path.write_text("1")
    except OSError as error:
        raise HostError(f"cannot set net.ipv4.ip_forward to 1: {error}") from error
