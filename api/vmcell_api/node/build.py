"""Making a sandbox: from an image's name to an envd that has its token.

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
    CREATING,
    END_LABEL,
    RUNNING,
    SANDBOX_LABEL,
    STARTED_LABEL,
    STATE_LABEL,
    Sandbox,
    unix_ms_now,
)
from vmcell_api.node.slot_plan import Slot
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
        died: threading.Event,
    ) -> Sandbox:
        """Makes and starts the sandbox in `slot`; its deadline counts from the return on.

        Whoever sees its task end sets `died`: then the guest is not waited for any longer.
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
        )
        deadline = time.monotonic() + self._settings.start_timeout_s
        files = sandbox_files.write(
            self._settings.state_dir,
            sandbox.sandbox_id,
            address=slot.guest_address,
            nameservers=self._settings.nameservers,
            access_token=request.access_token,
        )
        self._create_task(sandbox, image, slot, files, deadline, init=request.init)
        self._containerd.start_task(
            sandbox.sandbox_id, timeout_s=max(1.0, deadline - time.monotonic())
        )
        guest_init.initialise(
            sandbox.address,
            access_token=request.access_token,
            environment=_guest_environment(request),
            default_user=request.default_user,
            default_workdir=request.default_workdir,
            timeout_s=max(1.0, deadline - time.monotonic()),
            died=died,
        )
        _start_template(request, sandbox.address, image, deadline, died)
        now = unix_ms_now()
        sandbox = replace(sandbox, started_at_unix_ms=now, end_at_unix_ms=now + request.timeout_ms)
        labels = sandbox.labels(RUNNING)
        changed = (STATE_LABEL, STARTED_LABEL, END_LABEL)
        self._containerd.set_labels(sandbox.sandbox_id, {name: labels[name] for name in changed})
        return sandbox

    def _create_task(
        self,
        sandbox: Sandbox,
        image: oci_image.ImageConfig,
        slot: Slot,
        files: tuple[tuple[str, str], ...],
        deadline: float,
        *,
        init: str,
    ) -> None:
        containerd, sandbox_id = self._containerd, sandbox.sandbox_id
        lease = LEASE_PREFIX + sandbox_id
        expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + LEASE_LIFE_S))
        containerd.create_lease(lease, {"containerd.io/gc.expire": expiry})
        mounts = self._prepare_snapshot(sandbox, image, lease)
        spec = oci_spec.build_spec(
            oci_spec.SandboxMachine(
                sandbox_id=sandbox_id,
                namespace=containerd.namespace,
                vcpus=sandbox.vcpus,
                memory_mib=sandbox.memory_mib,
                tap=slot.tap,
                mac=slot.guest_mac,
                address=slot.guest_address,
                gateway=slot.host_address,
                environment=image.environment,
                working_directory=image.working_directory,
                file_mounts=files,
                init=init,
                volume_mounts=tuple(
                    (mount.path, self._settings.volumes.path(mount.volume_id))
                    for mount in sandbox.volume_mounts
                ),
            )
        )
        containerd.create_container(
            sandbox_id,
            image=sandbox.image,
            labels=sandbox.labels(CREATING),
            runtime=self._settings.runtime,
            spec=spec,
            lease=lease,
        )
        containerd.delete_lease(lease)
        containerd.create_task(sandbox_id, mounts, timeout_s=max(1.0, deadline - time.monotonic()))

    def _prepare_snapshot(
        self, sandbox: Sandbox, image: oci_image.ImageConfig, lease: str
    ) -> list[types_pb2.Mount]:
        try:
            return self._containerd.prepare_snapshot(
                sandbox.sandbox_id,
                parent=image.chain_id,
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


def _guest_environment(request: SandboxRequest) -> dict[str, str]:
    """The environment of every command: what the caller gave and what E2B promises."""
    return {
        **request.environment,
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": request.sandbox_id,
        "E2B_TEMPLATE_ID": request.template_id,
    }
