"""The network of a namespace, given to a microVM: a TAP beside each interface, joined by redirects.

What arrives at the interface goes to the TAP, what the guest sends by the TAP leaves by the
interface: both at traffic control's ingress hook, before the namespace's own stack sees the frame.
So the interface keeps its addresses for whoever looks (CNI, `nerdctl inspect`, the kubelet's
counters), and answers nobody with them.

    peer <-> eth0 | ingress → vmtap2 | VMM <-> guest's eth0 (same MAC, MTU, addresses, routes)
                  | egress  ← vmtap2 |

A TAP lives as long as its descriptors, so a killed VMM takes it along. The redirects stay until
`close()`, `detach()` or the end of the namespace.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

from vmcell_protos import rtnetlink, rtnetlink_rows, rtnetlink_tc
from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.interfaces import read_interfaces
from vmcell_shim.netns import in_namespace, open_namespace
from vmcell_shim.rtnetlink_socket import RtnetlinkSocket
from vmcell_shim.tap import make_tap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.agent import Interface
    from vmcell_shim.oci_json import Json

# A kernel without IPv6 has no such setting.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
_GONE = (errno.ENODEV, errno.ENOENT, errno.EINVAL)


@dataclass(frozen=True, kw_only=True)
class NetDevice:
    """One TAP (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, non-blocking) for a `NetConfig`. `mac` is what
    the guest's interface has; the descriptor is the PodNetwork's."""

    tap_fd: int
    mac: str
    mtu: int


class PodNetwork:
    """Devices for the VMM and interfaces for the agent, in the same order. Made by attach()."""

    def __init__(self, namespace: str, cookie: int) -> None:
        self.devices: list[NetDevice] = []
        self.interfaces: list[Interface] = []
        self._namespace = namespace
        self._cookie = cookie
        self._joins: list[Json] = []

    @property
    def record(self) -> Json:
        """What detach() needs, as JSON for the state file."""
        return {"namespace": self._namespace, "cookie": self._cookie, "joins": list(self._joins)}

    def release_taps(self) -> None:
        """Closes our descriptors of the TAPs; to be called when the VMM has its own, so that TAPs
        and namespace end with it. Idempotent."""
        for device in self.devices:
            os.close(device.tap_fd)
        self.devices = []

    def close(self) -> None:
        """Takes redirects and TAPs away, also when the namespace has gone. Idempotent. HostError
        when something stays behind."""
        self.release_taps()
        detach(self.record)

    def _join(self, kernel: RtnetlinkSocket, namespace: int, index: int, row: Interface) -> None:
        request = rtnetlink_tc.add_ingress(index)
        what = f"add an ingress qdisc to {row.name}"
        if kernel.request(request, what, tolerated=(errno.EEXIST,)):
            raise HostError(
                f"interface {row.name} of {self._namespace} has an ingress qdisc already; "
                "another microVM has it, or tc filters that would not see the guest's frames",
                code="failed_precondition",
            )
        # The name is the interface's own index, which leaves 15 characters at the most.
        tap = f"vmtap{index}"
        self._joins.append({"interface": row.name, "index": index, "tap": tap})
        fd, tap_index = in_namespace(namespace, lambda: _new_tap(tap))
        self.devices.append(NetDevice(tap_fd=fd, mac=row.mac, mtu=row.mtu))
        self.interfaces.append(row)
        kernel.request(
            rtnetlink.without_link_local(tap_index), f"keep {tap} quiet", tolerated=_NO_IPV6
        )
        kernel.request(
            rtnetlink.set_link(tap_index, mtu=row.mtu, up=True), f"bring up {tap}, MTU {row.mtu}"
        )
        kernel.request(rtnetlink_tc.add_ingress(tap_index), f"add an ingress qdisc to {tap}")
        kernel.request(rtnetlink_tc.redirect(tap_index, index), f"redirect {tap} to {row.name}")
        kernel.request(rtnetlink_tc.redirect(index, tap_index), f"redirect {row.name} to {tap}")


def attach(path: str) -> PodNetwork:
    """Joins every interface of the namespace at `path`; the caller owns the result.

    Raises CallerError for a namespace or interface that cannot be given to a guest, HostError when
    the kernel refuses; nothing is left then.
    """
    namespace = open_namespace(path)
    try:
        with in_namespace(namespace, RtnetlinkSocket) as kernel:
            network = PodNetwork(path, kernel.namespace_cookie())
            try:
                for index, interface in read_interfaces(kernel):
                    network._join(kernel, namespace, index, interface)
            except BaseException:
                network.close()
                raise
        return network
    finally:
        os.close(namespace)


def detach(record: Json) -> None:
    """Undoes attach() by its record; where the namespace has gone there is nothing to do.

    May be called again. Raises HostError when the kernel refuses.
    """
    try:
        path, cookie = str(record["namespace"]), int(record["cookie"])
        joins = [(str(j["interface"]), int(j["index"]), str(j["tap"])) for j in record["joins"]]
    except (KeyError, TypeError, ValueError) as error:
        raise HostError(f"the record of a pod's network is damaged: {error!r}") from error
    try:
        namespace = open_namespace(path)
    except CallerError:
        return
    try:
        with in_namespace(namespace, RtnetlinkSocket) as kernel:
            if kernel.namespace_cookie() != cookie:
                return
            links = map(rtnetlink_rows.parse_link, kernel.dump(rtnetlink.RTM_GETLINK))
            present = {link.name: link.index for link in links}
            for interface, index, tap in joins:
                if present.get(interface) == index:
                    request = rtnetlink_tc.delete_ingress(index)
                    kernel.request(request, f"take {interface} off {tap}", tolerated=_GONE)
                if tap in present:
                    request = rtnetlink.delete_link(present[tap])
                    kernel.request(request, f"remove {tap}", tolerated=_GONE)
    finally:
        os.close(namespace)


def _new_tap(name: str) -> tuple[int, int]:
    fd = make_tap(name)
    try:
        return fd, socket.if_nametoindex(name)
    except OSError as error:
        os.close(fd)
        raise HostError(f"TAP {name} is gone right after it was made: {error}") from error
