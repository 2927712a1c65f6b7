"""Making a sandbox: from an image's name, or from a snapshot, to an envd that has its token.

The order of steps is fixed by containerd: lease, snapshot, container, task. The container's labels
say `creating` until the end, so that whoever finds a half-made one knows.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

from vmcell_api.egress import OPEN, Egress
from vmcell_api.node import guest_init, oci_image, oci_spec, sandbox_files, start_command
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.guest_process import Command, GuestProcesses
from vmcell_api.node.oci_spec import ENVD
from vmcell_api.node.sandbox import (
    ADDRESS_LABEL,
    CREATING,
    END_LABEL,
    PARKED,
    RUNNING,
    SANDBOX_LABEL,
    SLOT_LABEL,
    SNAPSHOT_LABEL,
    STARTED_LABEL,
    STATE_LABEL,
    Sandbox,
    unix_ms_now,
)
from vmcell_api.node.slot_plan import Slot
from vmcell_api.node.snapshot_records import SnapshotRecord
from vmcell_api.node.teardown import LEASE_PREFIX
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.names import VolumeMount
from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_protos.pb.containerd import types_pb2

LEASE_LIFE_S = 3600


@dataclass(frozen=True, kw_only=True)
class SandboxRequest:
    """What a create asks for, checked; `access_token` "" lets everybody into envd."""

    sandbox_id: str
    template_id: str
    image: str
    vcpus: int
    memory_mib: int
    timeout_ms: int
    environment: dict[str, str] = field(default_factory=dict)
    access_token: str = field(default="", repr=False)
    default_user: str = ""
    egress: Egress = OPEN
    default_workdir: str = ""
    start_command: str = ""
    ready_command: str = ""
    init: str = ENVD  # or the builder's, which gives away what was written
    volume_mounts: tuple[VolumeMount, ...] = ()
    pause_on_timeout: bool = False
    auto_resume: bool = False
    snapshot_id: str = ""  # "": the machine boots


@dataclass
class MachineLife:
    """One task of a sandbox; `died` is set by whoever sees it end, `pid` is 0 until it is made."""

    died: threading.Event = field(default_factory=threading.Event)
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What is the same for every sandbox of the node."""

    runtime: str
    state_dir: str
    nameservers: tuple[str, ...]
    start_timeout_s: int
    volumes: VolumeFolders


class SandboxBuilder:
    """Builds sandboxes; thread-safe. Rolling back a failed build is the caller's (`tear_down`)."""

    def __init__(self, containerd: Containerd, settings: BuildSettings) -> None:
        self._containerd = containerd
        self._settings = settings
        self._images: dict[str, oci_image.ImageConfig] = {}

    def image_config(self, name: str) -> oci_image.ImageConfig:
        """The image's config, cached by digest; CallerError not_found when it is not imported."""
        target = self._containerd.image_target(name)
        if target.digest not in self._images:
            digest = target.digest
            if target.media_type in oci_image.INDEX_TYPES:
                index = self._containerd.read_blob(digest)
                digest = oci_image.manifest_digest(index, name)
            manifest = self._containerd.read_blob(digest)
            config = self._containerd.read_blob(oci_image.config_digest(manifest, name))
            self._images[target.digest] = oci_image.parse_config(config, name)
        return self._images[target.digest]

    def build(
        self,
        request: SandboxRequest,
        image: oci_image.ImageConfig,
        slot: Slot,
        life: MachineLife,
    ) -> Sandbox:
        """Makes and starts the sandbox in `slot`; its deadline counts from the return on.

        Whoever sees its task end sets `life.died`: then the guest is not waited for any longer.
        """
        sandbox = Sandbox(
            sandbox_id=request.sandbox_id,
            template_id=request.template_id,
            image=request.image,
            vcpus=request.vcpus,
            memory_mib=request.memory_mib,
            slot_number=slot.number,
            egress=request.egress,
            address=slot.guest_address,
            volume_mounts=request.volume_mounts,
            timeout_ms=request.timeout_ms,
            pause_on_timeout=request.pause_on_timeout,
            auto_resume=request.auto_resume,
        )
        deadline = time.monotonic() + self._settings.start_timeout_s
        files = self._write_files(sandbox, request.access_token, request.environment)
        spec = self._spec(sandbox, slot, files, image=image, init=request.init)
        mounts = self._create_container(sandbox, image.chain_id, spec)
        self._start_machine(sandbox, mounts, deadline, life)
        guest_init.initialise(
            sandbox.address,
            access_token=request.access_token,
            environment=_guest_environment(request.environment, sandbox),
            default_user=request.default_user,
            default_workdir=request.default_workdir,
            timeout_s=max(1.0, deadline - time.monotonic()),
            died=life.died,
        )
        _start_template(request, sandbox.address, image, deadline, life.died)
        return self._label_running(sandbox, request.timeout_ms)

    def restore(
        self,
        request: SandboxRequest,
        record: SnapshotRecord,
        slot: Slot,
        life: MachineLife,
    ) -> Sandbox:
        """Makes a sandbox of a snapshot, which `record` describes; as `build` otherwise.

        Image and sizes are the snapshot's; what the request sets is set over what was saved.
        """
        sandbox = Sandbox(
            sandbox_id=request.sandbox_id,
            template_id=request.template_id,
            image=record.image,
            vcpus=record.vcpus,
            memory_mib=record.memory_mib,
            slot_number=slot.number,
            egress=request.egress,
            address=slot.guest_address,
            timeout_ms=request.timeout_ms,
            pause_on_timeout=request.pause_on_timeout,
            auto_resume=request.auto_resume,
        )
        restored = self._restored(
            sandbox,
            record,
            slot,
            life,
            access_token=request.access_token,
            environment={**record.environment, **request.environment},
        )
        return self._label_running(restored, request.timeout_ms)

    def restore_beside(
        self, sandbox: Sandbox, record: SnapshotRecord, slot: Slot, life: MachineLife, token: str
    ) -> Sandbox:
        """Restores a snapshot in a new container of a sandbox that goes on; it is `creating` still.

        `sandbox` has the container's id and generation already; `token` is the one clients have.
        """
        return self._restored(
            sandbox, record, slot, life, access_token=token, environment=record.environment
        )

    def park(
        self, sandbox_id: str, record: SnapshotRecord, slot: Slot, life: MachineLife, token: str
    ) -> Sandbox:
        """Restores a snapshot for whoever comes; nobody but the caller knows the `token`."""
        sandbox = Sandbox(
            sandbox_id=sandbox_id,
            template_id=record.template_id,
            image=record.image,
            vcpus=record.vcpus,
            memory_mib=record.memory_mib,
            slot_number=slot.number,
            address=slot.guest_address,
            state=PARKED,
        )
        token = token if record.access_token else ""  # such an envd takes none
        parked = self._restored(sandbox, record, slot, life, access_token=token, environment={})
        self._containerd.set_labels(sandbox.container, {STATE_LABEL: PARKED})
        return parked

    def hand_out(
        self, request: SandboxRequest, parked: Sandbox, life: MachineLife, *, token: str
    ) -> Sandbox:
        """The parked sandbox, which has `token`, as the one that is asked for.

        Its host name stays that of its container.
        """
        sandbox = replace(
            parked,
            sandbox_id=request.sandbox_id,
            container_id=parked.container,
            template_id=request.template_id,
            egress=request.egress,
            timeout_ms=request.timeout_ms,
            pause_on_timeout=request.pause_on_timeout,
            auto_resume=request.auto_resume,
        )
        self._write_files(sandbox, request.access_token, request.environment)
        guest_init.initialise(
            sandbox.address,
            access_token=request.access_token,
            environment=_guest_environment(request.environment, sandbox),
            default_user="",
            present_token=token,
            timeout_s=self._settings.start_timeout_s,
            died=life.died,
        )
        self._containerd.set_labels(sandbox.container, sandbox.labels(PARKED))
        return self._label_running(sandbox, request.timeout_ms)

    def wake(
        self,
        sandbox: Sandbox,
        record: SnapshotRecord,
        slot: Slot,
        life: MachineLife,
        *,
        timeout_ms: int,
    ) -> Sandbox:
        """Restores a paused sandbox in its own container, in `slot`; it keeps its token.

        Until the last step its labels say that it is paused, so a failure leaves it so.
        """
        deadline = time.monotonic() + self._settings.start_timeout_s
        moved = replace(sandbox, slot_number=slot.number, address=slot.guest_address)
        files = self._write_files(moved, record.access_token, record.environment)
        spec = self._spec(moved, slot, files, snapshot_id=record.snapshot_id)
        # The disk that the last machine wrote is in the snapshot; the rest of it would be in the
        # way.
        self._containerd.remove_snapshot(moved.container)
        mounts = self._prepare(moved, record.chain_id, lease="")
        labels = moved.labels(sandbox.state)
        changed = {name: labels[name] for name in (SLOT_LABEL, ADDRESS_LABEL)}
        self._containerd.rewrite_container(moved.container, labels=changed, spec=spec)
        self._start_machine(moved, mounts, deadline, life)
        guest_init.initialise(
            moved.address,
            access_token=record.access_token,
            environment=None,
            default_user="",
            present_token=record.access_token,
            timeout_s=max(1.0, deadline - time.monotonic()),
            died=life.died,
        )
        return self._label_running(moved, timeout_ms)

    def _restored(
        self,
        sandbox: Sandbox,
        record: SnapshotRecord,
        slot: Slot,
        life: MachineLife,
        *,
        access_token: str,
        environment: dict[str, str],
    ) -> Sandbox:
        deadline = time.monotonic() + self._settings.start_timeout_s
        files = self._write_files(sandbox, access_token, environment)
        spec = self._spec(sandbox, slot, files, snapshot_id=record.snapshot_id)
        mounts = self._create_container(sandbox, record.chain_id, spec)
        self._start_machine(sandbox, mounts, deadline, life)
        guest_init.initialise(
            sandbox.address,
            access_token=access_token,
            environment=_guest_environment(environment, sandbox),
            default_user="",
            present_token=record.access_token,
            timeout_s=max(1.0, deadline - time.monotonic()),
            died=life.died,
        )
        return sandbox

    def _label_running(self, sandbox: Sandbox, timeout_ms: int) -> Sandbox:
        """Writes that the sandbox runs from now on; it is whole then."""
        now = unix_ms_now()
        running = replace(
            sandbox.in_state(RUNNING),
            started_at_unix_ms=sandbox.started_at_unix_ms or now,
            end_at_unix_ms=now + timeout_ms,
        )
        labels = running.labels(RUNNING)
        changed = (STATE_LABEL, STARTED_LABEL, END_LABEL, SNAPSHOT_LABEL)
        self._containerd.set_labels(running.container, {name: labels[name] for name in changed})
        return running

    def _write_files(
        self, sandbox: Sandbox, access_token: str, environment: dict[str, str]
    ) -> tuple[tuple[str, str], ...]:
        return sandbox_files.write(
            self._settings.state_dir,
            sandbox.container,
            address=sandbox.address,
            nameservers=self._settings.nameservers,
            access_token=access_token,
            environment=environment,
            hostname=sandbox.sandbox_id,
        )

    def _start_machine(
        self,
        sandbox: Sandbox,
        mounts: list[types_pb2.Mount],
        deadline: float,
        life: MachineLife,
    ) -> None:
        left_s = max(1.0, deadline - time.monotonic())
        life.pid = self._containerd.create_task(sandbox.container, mounts, timeout_s=left_s)
        left_s = max(1.0, deadline - time.monotonic())
        self._containerd.start_task(sandbox.container, timeout_s=left_s)

    def _spec(
        self,
        sandbox: Sandbox,
        slot: Slot,
        files: tuple[tuple[str, str], ...],
        *,
        image: oci_image.ImageConfig | None = None,
        init: str = ENVD,
        snapshot_id: str = "",
    ) -> bytes:
        return oci_spec.build_spec(
            oci_spec.SandboxMachine(
                sandbox_id=sandbox.container,
                hostname=sandbox.sandbox_id,
                namespace=self._containerd.namespace,
                vcpus=sandbox.vcpus,
                memory_mib=sandbox.memory_mib,
                tap=slot.tap,
                mac=slot.guest_mac,
                address=slot.guest_address,
                gateway=slot.host_address,
                environment=image.environment if image else (),
                working_directory=image.working_directory if image else "/",
                file_mounts=files,
                init=init,
                snapshot_id=snapshot_id,
                volume_mounts=tuple(
                    (mount.path, self._settings.volumes.path(mount.volume_id))
                    for mount in sandbox.volume_mounts
                ),
            )
        )

    def _create_container(
        self, sandbox: Sandbox, chain_id: str, spec: bytes
    ) -> list[types_pb2.Mount]:
        """The container record above a fresh snapshot of the image's layers; its mounts."""
        containerd, container_id = self._containerd, sandbox.container
        lease = LEASE_PREFIX + container_id
        expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + LEASE_LIFE_S))
        containerd.create_lease(lease, {"containerd.io/gc.expire": expiry})
        mounts = self._prepare(sandbox, chain_id, lease)
        containerd.create_container(
            container_id,
            image=sandbox.image,
            labels=sandbox.labels(CREATING),
            runtime=self._settings.runtime,
            spec=spec,
            lease=lease,
        )
        containerd.delete_lease(lease)
        return mounts

    def _prepare(self, sandbox: Sandbox, chain_id: str, lease: str) -> list[types_pb2.Mount]:
        try:
            return self._containerd.prepare_snapshot(
                sandbox.container,
                parent=chain_id,
                labels={SANDBOX_LABEL: sandbox.sandbox_id},
                lease=lease,
            )
        except CallerError as error:
            if error.code != "not_found":
                raise
            raise CallerError(
                f"image {sandbox.image!r} is not unpacked for snapshotter "
                f"{self._containerd.snapshotter}; import it again without --no-unpack",
                code="failed_precondition",
            ) from error


def _start_template(
    request: SandboxRequest,
    address: str,
    image: oci_image.ImageConfig,
    deadline: float,
    died: threading.Event,
) -> None:
    """What a template wants running in each of its sandboxes, and the wait until it is ready.

    An image's labels say so for templates that do not; their commands are root's.
    """
    start, ready, user = request.start_command, request.ready_command, request.default_user
    if not start and not ready:
        start, ready, user = image.start_command, image.ready_command, "root"
    if (not start and not ready) or request.init != ENVD:
        return
    guest = GuestProcesses(address, request.access_token)
    environment = dict(row.split("=", 1) for row in image.environment)

    def command(text: str) -> Command:
        return Command(
            text=text,
            user=user,
            workdir=request.default_workdir,
            environment=environment,
        )

    try:
        if start:
            start_command.start(guest, command(start), deadline=deadline)
        if ready:
            start_command.wait_ready(guest, command(ready), deadline=deadline, failed=died)
    except VmcellError as error:  # asking again would end the same way
        raise HostError(f"the template did not start: {error}", code="internal") from error


def _guest_environment(environment: dict[str, str], sandbox: Sandbox) -> dict[str, str]:
    """The environment of every command: what the caller gave and what E2B promises."""
    return {
        **environment,
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": sandbox.sandbox_id,
        "E2B_TEMPLATE_ID": sandbox.template_id,
    }
