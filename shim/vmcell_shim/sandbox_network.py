"""The network of one sandbox on the host, made and undone in the right order.

    hooks that are to be undone noted → namespace made → createRuntime hooks → TAPs joined →
    VM booted → poststart hooks, port forward …  → VM ended → joins undone → poststop hooks →
    namespace removed

Who has what: a TAP that noded made (annotations); a namespace that CNI made before (a path in the
spec); a namespace of the sandbox's own that hooks fill (nerdctl); or the guest's loopback alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from vmcell_protos.agent import Interface
from vmcell_protos.errors import VmcellError
from vmcell_shim import hooks as oci_hooks
from vmcell_shim import pod_network
from vmcell_shim.netns import make_namespace, remove_namespace, wanted_namespace
from vmcell_shim.port_forward import open_port_forward, remove_rules
from vmcell_shim.shape import NetPort
from vmcell_shim.tap import open_tap

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmcell_shim.annotations import TapNetwork
    from vmcell_shim.hooks import Hook, HookState
    from vmcell_shim.journal import Journal
    from vmcell_shim.oci_json import Json
    from vmcell_shim.pod_network import NetDevice, PodNetwork
    from vmcell_shim.port_forward import PortForward
    from vmcell_shim.sandbox_files import SandboxFiles

_TAP_MTU = 1500
# containerd gives `delete` five seconds.
_POSTSTOP_S = 3.0


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """What a spec asks for. `namespace` "": none, or one of the sandbox's own for `hooks`."""

    tap: TapNetwork | None = None
    namespace: str = ""
    hooks: dict[str, tuple[Hook, ...]] | None = None


def plan_network(spec: Json, tap: TapNetwork | None) -> NetworkPlan:
    """The plan of a sandbox from its spec; raises CallerError for the host's network."""
    hooks = oci_hooks.parse_hooks(spec)
    namespace = "" if tap is not None else wanted_namespace(spec)
    return NetworkPlan(tap=tap, namespace=namespace, hooks=hooks)


class SandboxNetwork:
    """Owns what open() made until close(); what `delete` needs is in `files` at any time."""

    def __init__(self, files: SandboxFiles, journal: Journal) -> None:
        self._files = files
        self._journal = journal
        self._plan = NetworkPlan()
        self._state: HookState | None = None
        self._network: PodNetwork | None = None
        self._forward: PortForward | None = None
        self._namespace = ""

    def open(
        self, plan: NetworkPlan, spec: Json, sandbox_id: str, bundle: str
    ) -> tuple[NetPort, ...]:
        """Makes it; the guest's ports. Raises VmcellError: close() undoes what was made."""
        self._plan = plan
        if plan.tap is not None:
            return (_tap_port(plan.tap),)
        self._namespace = plan.namespace
        hooks = plan.hooks or {}
        fills = any(hooks.get(point) for point in (oci_hooks.PRESTART, oci_hooks.CREATE_RUNTIME))
        if fills and not self._namespace:
            make_namespace(self._files.namespace)
            self._namespace = self._files.namespace
        self._state = oci_hooks.hook_state(spec, sandbox_id, bundle, self._namespace)
        self._files.poststop = oci_hooks.poststop_record(hooks, self._state)
        self._files.save()
        for point in (oci_hooks.PRESTART, oci_hooks.CREATE_RUNTIME):
            oci_hooks.run_hooks(point, hooks, self._state, pid=0)
        if not self._namespace:
            return ()
        self._network = pod_network.attach(self._namespace)
        self._files.network = self._network.record
        self._files.save()
        rows = zip(self._network.devices, self._network.interfaces, strict=True)
        return tuple(_joined_port(device, interface) for device, interface in rows)

    def booted(self) -> None:
        """The VMM has descriptors of its own: from here on the TAPs end with it."""
        if self._network is not None:
            self._network.release_taps()

    def forward_ports(self, dial: Callable[[int], socket.socket]) -> None:
        """Carries connections to the namespace's loopback into the guest, where that is possible;
        without it everything else works, so it is only logged."""
        if not self._namespace:
            return
        self._files.network = {**self._files.network, "forwards": True}
        try:
            self._files.save()
            self._forward = open_port_forward(self._namespace, dial, self._journal)
        except VmcellError as error:
            self._journal.warning(f"no port forward into {self._namespace}: {error}")

    def started(self, pid: int) -> None:
        """Runs the poststart hooks. Raises HostError."""
        if self._plan.hooks and self._state is not None:
            oci_hooks.run_hooks(oci_hooks.POSTSTART, self._plan.hooks, self._state, pid=pid)

    def close(self) -> None:
        """Undoes all of it; what cannot be undone is logged. Idempotent."""
        if self._forward is not None:
            self._forward.close()
            self._forward = None
            self._files.network = {**self._files.network, "forwards": False}
        if self._network is not None:
            self._network.release_taps()
            self._network = None
        for failure in undo(self._files):
            self._journal.error(failure)


def undo(files: SandboxFiles) -> list[str]:
    """What is left of a sandbox's network goes, by its state file alone; a sentence for each thing
    that stays. May be called again."""
    failures = []
    if files.network:
        steps = [partial(pod_network.detach, files.network)]
        if files.network.get("forwards"):
            steps.append(partial(remove_rules, str(files.network["namespace"])))
        for step in steps:
            try:
                step()
            except VmcellError as error:
                failures.append(str(error))
    try:
        failures += oci_hooks.run_poststop(files.poststop, within_s=_POSTSTOP_S)
        remove_namespace(files.namespace)
    except VmcellError as error:
        failures.append(str(error))
    files.network, files.poststop = {}, {}
    return failures


def _tap_port(network: TapNetwork) -> NetPort:
    interface = Interface(
        name="eth0", mac=network.mac, addresses=[network.address], gateway=network.gateway
    )
    return NetPort(
        open=lambda: open_tap(network.tap), mac=network.mac, mtu=_TAP_MTU, interface=interface
    )


def _joined_port(device: NetDevice, interface: Interface) -> NetPort:
    return NetPort(
        open=lambda: os.dup(device.tap_fd), mac=device.mac, mtu=device.mtu, interface=interface
    )
