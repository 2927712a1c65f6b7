"""Making a sandbox: from an image's name to an envd that has its token.

The order of steps is fixed by containerd: lease, snapshot, container, task. The container's labels
say `creating` until the end, so that whoever finds a half-made one knows.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

from vmcell_api.node import guest_init, oci_image, oci_spec, sandbox_files, start_command
from vmcell_api.node.containerd import Containerd
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
from vmcell_protos.errors import CallerError
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
    allow_internet: bool = True


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What is the same for every sandbox of the node."""

    runtime: str
    state_dir: str
    nameservers: tuple[str, ...]
    start_timeout_s: int


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
            allow_internet=request.allow_internet,
            address=slot.guest_address,
        )
        deadline = time.monotonic() + self._settings.start_timeout_s
        self._create_task(sandbox, image, slot, deadline)
        self._containerd.start_task(
            sandbox.sandbox_id, timeout_s=max(1.0, deadline - time.monotonic())
        )
        guest_init.initialise(
            sandbox.address,
            access_token=request.access_token,
            environment=_guest_environment(request),
            default_user=request.default_user,
            timeout_s=max(1.0, deadline - time.monotonic()),
            died=died,
        )
        start_command.run(
            sandbox.address,
            start_command.StartCommand(start=image.start_command, ready=image.ready_command),
            access_token=request.access_token,
            timeout_s=max(1.0, deadline - time.monotonic()),
            died=died,
        )
        now = unix_ms_now()
        sandbox = replace(sandbox, started_at_unix_ms=now, end_at_unix_ms=now + request.timeout_ms)
        labels = sandbox.labels(RUNNING)
        changed = (STATE_LABEL, STARTED_LABEL, END_LABEL)
        self._containerd.set_labels(sandbox.sandbox_id, {name: labels[name] for name in changed})
        return sandbox

    def _create_task(
        self, sandbox: Sandbox, image: oci_image.ImageConfig, slot: Slot, deadline: float
    ) -> None:
        containerd, sandbox_id = self._containerd, sandbox.sandbox_id
        lease = LEASE_PREFIX + sandbox_id
        expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + LEASE_LIFE_S))
        containerd.create_lease(lease, {"containerd.io/gc.expire": expiry})
        mounts = self._prepare_snapshot(sandbox, image, lease)
        files = sandbox_files.write(
            self._settings.state_dir,
            sandbox_id,
            address=slot.guest_address,
            nameservers=self._settings.nameservers,
        )
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


def _guest_environment(request: SandboxRequest) -> dict[str, str]:
    """The environment of every command: what the caller gave and what E2B promises."""
    return {
        **request.environment,
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": request.sandbox_id,
        "E2B_TEMPLATE_ID": request.template_id,
    }
