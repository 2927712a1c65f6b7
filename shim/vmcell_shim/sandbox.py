"""One microVM and what it has on the host. The containers in it come and go.

A container without a pod has a sandbox of its own, booted with the container's root among its fixed
devices, and ends with it. A pod's sandbox is booted without any root; those of its containers are
plugged into spare windows and taken out again, and it ends with its pause container or, in a group
without one, with its last member.

    new ──boot──▶ booting ──▶ up ──close──▶ closed
                     └──failed──▶ closed
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import NamedTuple

from vmcell_protos.agent import Rootfs
from vmcell_protos.errors import HostError, VmcellError
from vmcell_shim.adoption import check_interfaces
from vmcell_shim.cgroup import create_cgroup, remove_cgroup
from vmcell_shim.cgroup_limits import host_limits, parse_cgroups_path
from vmcell_shim.guest import Guest, Plugged
from vmcell_shim.living import identify
from vmcell_shim.oci_json import take
from vmcell_shim.sandbox_network import SandboxNetwork
from vmcell_shim.shape import GuestShape
from vmcell_shim.share import Share
from vmcell_shim.sizing import MachineSize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_protos.agent import FileCopy
    from vmcell_shim.cgroup import HostCgroup
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.journal import Journal
    from vmcell_shim.oci_json import Json
    from vmcell_shim.rootfs import RootImages
    from vmcell_shim.sandbox_files import SandboxFiles
    from vmcell_shim.shape import NetPort
    from vmcell_shim.snapshot_store import OpenSnapshot
    from vmcell_shim.spec import GuestPlan

# A pod's containers have two windows each, image and disk: twelve containers at once.
POD_WINDOWS = 24
_CGROUP_S = 1.0
_SHARE_S = 2.0
NEW, BOOTING, UP, CLOSED = "new", "booting", "up", "closed"


class RootDevices(NamedTuple):
    """A container's root as the guest is to mount it, and what was plugged in for it."""

    rootfs: Rootfs
    plugged: tuple[Plugged, ...]


class Sandbox:
    """Owns the guest and the sandbox's files until close(). `on_end` runs once, in a thread of its
    own, when the VM has ended."""

    def __init__(
        self,
        sandbox_id: str,
        *,
        is_pod: bool,
        config: ShimConfig,
        files: SandboxFiles,
        journal: Journal,
        on_end: Callable[[], None],
    ) -> None:
        self.id = sandbox_id
        self.is_pod = is_pod
        self.files = files
        files.log_dir = config.log_dir
        self.state = NEW
        self.memory_mib = self.vcpus = 0
        self.macs: tuple[str, ...] = ()
        self._config = config
        self._journal = journal
        self._changed = threading.Condition()
        self._boot_error: VmcellError | None = None
        self.guest = Guest(journal, on_end)
        self.network = SandboxNetwork(files, journal)
        # Of every member that has nothing mounted there.
        self.member_files: tuple[FileCopy, ...] = ()
        self._share: Share | None = None
        self._cgroup: HostCgroup | None = None

    def boot(
        self,
        plan: GuestPlan,
        spec: Json,
        bundle: str,
        images: RootImages | None,
        deadline: float,
        saved: OpenSnapshot | None = None,
    ) -> None:
        """The VM is up when this returns; whoever comes first boots it, others wait.

        `spec` is that of the container it is booted for, in `bundle`; `deadline` in
        time.monotonic() seconds. With `saved` it goes on from there instead, as large as it was.
        Raises VmcellError; close the sandbox then.
        """
        with self._changed:
            first = self.state == NEW
            if first:
                self.state = BOOTING
            else:
                self._changed.wait_for(lambda: self.state != BOOTING)
            if self._boot_error is not None:
                raise self._boot_error
            if not first:
                return
        try:
            self._boot(plan, spec, bundle, images, deadline, saved)
        except BaseException as error:
            self._settle(error if isinstance(error, VmcellError) else HostError(repr(error)))
            raise
        self._settle(None)

    def _settle(self, error: VmcellError | None) -> None:
        with self._changed:
            self._boot_error = error
            self.state = UP if error is None else CLOSED
            self._changed.notify_all()

    def _boot(
        self,
        plan: GuestPlan,
        spec: Json,
        bundle: str,
        images: RootImages | None,
        deadline: float,
        saved: OpenSnapshot | None,
    ) -> None:
        self.files.shim = identify(os.getpid())
        self.files.create()
        self._journal.attach(self.files.shim_log)
        size = plan.size
        if saved is not None:
            size = MachineSize(vcpus=saved.manifest.vcpus, memory_mib=saved.manifest.memory_mib)
        verb = "booting" if saved is None else f"restoring snapshot {saved.id} as"
        self._journal.info(f"{verb} {self.id}: {size.vcpus} vCPUs, {size.memory_mib} MiB")
        self.memory_mib, self.vcpus = size.memory_mib, size.vcpus
        self._make_cgroup(spec, saved)
        nets = self.network.open(plan.network, spec, self.id, bundle)
        if saved is not None:
            check_interfaces(saved, len(nets))
        if plan.shares or self.is_pod:
            # What a pod's members will share is not known yet.
            self._share = Share(self.files.directory, self._share_lost)
            self.files.helpers = self._share.helpers
            self.files.save()
            for helper in self._share.helpers:
                self._join_cgroup(helper.pid)
        fixed = None if self.is_pod else images
        self.macs = tuple(port.mac for port in nets)
        shape = self._shape(plan, size, nets, fixed, saved)
        hello = self.guest.boot(shape, deadline, self._record_vmm)
        self.network.booted()
        if self.is_pod:
            self.network.forward_ports(self.guest.dial_forward)
        self._journal.info(
            f"guest {hello.kernel_release} ready, agent {hello.agent_version}, "
            f"kernel booted in {hello.kernel_boot_ms} ms"
        )

    def _make_cgroup(self, spec: Json, saved: OpenSnapshot | None) -> None:
        """The cgroup that the spec of the container or pod names, for all processes of the VM.

        `ctr containers restore` copies the spec of the container that was saved, with the name of
        that one's cgroup: this one's is called like itself.
        """
        path = parse_cgroups_path(take(spec, "linux.cgroupsPath", str, ""))
        if saved is not None and os.path.basename(path) == saved.manifest.container_id:
            path = os.path.join(os.path.dirname(path), self.id)
        if not path:
            return
        self.files.cgroup = path
        self.files.save()
        limits = host_limits(spec, guest_memory_mib=self.memory_mib, sandbox=self.is_pod)
        self._cgroup = create_cgroup(path, limits)
        if self._cgroup.missing:
            self._journal.info(f"limits kept by the guest alone: {', '.join(self._cgroup.missing)}")

    def _join_cgroup(self, pid: int) -> None:
        if self._cgroup is not None:
            self._cgroup.join(pid)

    def limit(self, resources: Json) -> None:
        """The host's side of an Update: CPU shares, quota and set of the whole VM. VmcellError."""
        if self._cgroup is not None and not self.is_pod:
            spec = {"linux": {"resources": resources}}
            limits = host_limits(spec, guest_memory_mib=self.memory_mib, sandbox=False)
            self._cgroup.set_limits(replace(limits, memory_bytes=None))

    def _share_lost(self, reason: str) -> None:
        # It goes with its VMM, whose end is told a moment later.
        if not self.guest.ended.wait(_SHARE_S):
            self._journal.error(f"live directories of {self.id} are gone: {reason}")

    def _shape(
        self,
        plan: GuestPlan,
        size: MachineSize,
        nets: tuple[NetPort, ...],
        images: RootImages | None,
        saved: OpenSnapshot | None,
    ) -> GuestShape:
        return GuestShape(
            kernel=self._config.kernel,
            base_image=self._config.base_image,
            images=images.lowers if images else (),
            disk=(images.disk or images.block_device) if images else "",
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            spare_windows=POD_WINDOWS if self.is_pod else 0,
            nets=nets,
            share=self._open_share if self._share is not None else None,
            hostname=plan.hostname,
            sysctls=plan.sysctls if self.is_pod else {},
            console_log=self.files.console_log,
            vmm_log=self.files.vmm_log,
            saved=saved,
            uids=self._config.vmm_uids,
        )

    @property
    def has_live_directories(self) -> bool:
        """It has a file system device, whose daemon knows what no snapshot does."""
        return self._share is not None

    def _open_share(self) -> int:
        assert self._share is not None
        return self._share.take_connection().detach()

    def _record_vmm(self, pid: int) -> None:
        try:
            self.files.vmm = identify(pid)
            self.files.save()
            self._join_cgroup(pid)
        except (OSError, ProcessLookupError) as error:
            raise HostError(f"cannot note the VMM {pid} in the state file: {error}") from error

    def attach(self, images: RootImages) -> RootDevices:
        """The root's devices in the guest, plugged in where the VM did not boot with them.

        Raises VmcellError; nothing is plugged in then.
        """
        if not self.is_pod:
            return RootDevices(
                Rootfs(
                    lower_devices=[f"pmem{number + 1}" for number in range(len(images.lowers))],
                    upper_device="vda" if images.disk else "",
                    block_device="vda" if images.block_device else "",
                ),
                (),
            )
        plugged: list[Plugged] = []
        try:
            for path in images.lowers:
                plugged.append(self.guest.plug(path, image=True))
            lowers = [device.name for device in plugged]
            disk = images.disk or images.block_device
            if disk:
                plugged.append(self.guest.plug(disk, image=False))
        except BaseException:
            self.detach(plugged)
            raise
        name = plugged[-1].name if disk else ""
        return RootDevices(
            Rootfs(
                lower_devices=lowers,
                upper_device=name if images.disk else "",
                block_device=name if images.block_device else "",
            ),
            tuple(plugged),
        )

    def share(self, source: str, *, read_only: bool, follow: bool) -> int:
        """The number under which the guest finds a live directory or file. Raises VmcellError."""
        if self._share is None:
            raise HostError(f"{source} cannot be shared: the microVM has no file system device")
        return self._share.add(source, read_only=read_only, follow=follow)

    def unshare(self, number: int) -> None:
        """Takes a share away again; one that stays is logged and ends with the sandbox."""
        try:
            if self._share is not None:
                self._share.remove(number)
        except VmcellError as error:
            self._journal.warning(f"share {number} of {self.id} stays: {error}")

    def detach(self, plugged: tuple[Plugged, ...] | list[Plugged]) -> None:
        """Takes a container's devices out; one that stays is logged and keeps its window."""
        for device in reversed(plugged):
            if self.guest.ended.is_set():
                return
            try:
                self.guest.unplug(device)
            except VmcellError as error:
                self._journal.error(f"{device.name} stays plugged into {self.id}: {error}")

    def close(self) -> None:
        """Nothing of the sandbox is left. Raises HostError; a second call tries again."""
        with self._changed:
            self.state = CLOSED
            self._changed.notify_all()
        self.guest.close()
        self.network.close()
        try:
            if self._share is not None:
                self._share.close()
            if self.files.cgroup:
                remove_cgroup(self.files.cgroup, timeout_s=_CGROUP_S)
        finally:
            self.files.remove()
