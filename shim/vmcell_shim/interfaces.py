"""The interfaces of a namespace, read from the kernel and told as the guest shall have them.

The guest's table is to be the namespace's: every route is carried over as it is, also those the
kernel has made for a prefix, because CNI plugins replace these (ptp, Calico).
"""

from __future__ import annotations

import re
import socket

from vmcell_protos import rtnetlink as nl
from vmcell_protos import rtnetlink_rows as rows
from vmcell_protos.agent import Interface, Neighbour, Route
from vmcell_protos.errors import CallerError
from vmcell_runtime.config import MAX_MTU, MAX_NET, MIN_MTU

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.rtnetlink_socket import RtnetlinkSocket

_UNICAST_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def read_interfaces(kernel: RtnetlinkSocket) -> list[tuple[int, Interface]]:
    """(index, what the guest gets) of each interface to be joined, in the kernel's order.

    Those that are down are nobody's network (the kernel puts some into every namespace), and those
    that belong to a bridge or bond are spoken for. CallerError, with the interface's name, for one
    that a guest cannot have.
    """
    links = sorted(map(rows.parse_link, kernel.dump(nl.RTM_GETLINK)), key=lambda link: link.index)
    used = [link for link in links if _is_in_use(link)]
    _check_all(used)
    found = [(link.index, _interface(link)) for link in used]
    by_index = dict(found)
    for address in filter(None, map(rows.parse_address, kernel.dump(nl.RTM_GETADDR))):
        interface = by_index.get(address.index)
        if interface is not None and not _is_link_local(address.address):
            interface.addresses.append(f"{address.address}/{address.prefix_length}")
    for route in filter(None, map(rows.parse_route, kernel.dump(nl.RTM_GETROUTE))):
        _add_route(by_index, route)
    for neighbour in filter(None, map(rows.parse_neighbour, kernel.dump(nl.RTM_GETNEIGH))):
        interface = by_index.get(neighbour.index)
        if interface is not None and neighbour.state & nl.NUD_PERMANENT and neighbour.mac:
            interface.neighbours.append(Neighbour(address=neighbour.address, mac=neighbour.mac))
    return found


def _is_in_use(link: rows.Link) -> bool:
    is_up = bool(link.flags & nl.IFF_UP)
    return is_up and not link.flags & rows.IFF_LOOPBACK and not link.master


def _check_all(links: list[rows.Link]) -> None:
    for link in links:
        what = f"interface {link.name} ({link.kind or 'hardware'}) of the pod's namespace"
        if link.hardware != rows.ARPHRD_ETHER or not _UNICAST_MAC.fullmatch(link.mac):
            raise CallerError(
                f"{what} is no Ethernet; a microVM has no other", code="unimplemented"
            )
        if link.flags & rows.IFF_NOARP:
            # Whoever sends by it asks nobody for an address; the guest's interface would.
            raise CallerError(
                f"{what} does no ARP; a microVM needs one that does (ipvlan: mode l2)",
                code="unimplemented",
            )
        if not MIN_MTU <= link.mtu <= MAX_MTU:
            raise CallerError(f"{what} has MTU {link.mtu}; a microVM takes {MIN_MTU} to {MAX_MTU}")
    names = [link.name for link in links]
    if len(names) > MAX_NET:
        raise CallerError(
            f"the pod's namespace has {len(names)} interfaces; a microVM takes {MAX_NET}, "
            f"which leaves out {', '.join(names[MAX_NET:])}",
            code="unimplemented",
        )
    owners: dict[str, str] = {}
    for link in links:
        other = owners.setdefault(link.mac, link.name)
        if other != link.name:
            raise CallerError(
                f"interfaces {other} and {link.name} of the pod's namespace have the same MAC "
                f"address {link.mac}; a microVM tells its interfaces apart by it",
                code="unimplemented",
            )


def _interface(link: rows.Link) -> Interface:
    return Interface(name=link.name, mac=link.mac, mtu=link.mtu)


def _add_route(interfaces: dict[int, Interface], route: rows.Route) -> None:
    if route.table != nl.RT_TABLE_MAIN or route.kind != nl.RTN_UNICAST:
        return
    destination = f"{route.destination}/{route.prefix_length}"
    if route.several_hops:
        raise CallerError(
            f"the route to {destination} of the pod's namespace has several gateways; "
            "a microVM takes one for each destination",
            code="unimplemented",
        )
    interface = interfaces.get(route.index)
    is_own = route.flags & rows.RTM_F_CLONED or _is_link_local(route.destination)
    if interface is None or is_own:
        return
    interface.routes.append(
        Route(
            destination=destination,
            gateway=route.gateway,
            source=route.source,
            metric=route.metric,
            mtu=route.mtu,
        )
    )


def _is_link_local(address: str) -> bool:
    """fe80::/10, which every stack gives itself."""
    if nl.family_of(address) != socket.AF_INET6:
        return False
    packed = socket.inet_pton(socket.AF_INET6, address)
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
