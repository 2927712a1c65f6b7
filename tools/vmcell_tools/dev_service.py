"""Images and the E2B service inside the dev VM, as the demo and the vm lane need them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.dev_ssh import forward_port
from vmcell_tools.dev_vm import running_vm
from vmcell_tools.image_import import archive_digest
from vmcell_tools.oci_image import find_oci_image
from vmcell_tools.progress import Progress

VMCELL = [sys.executable, "-m", "vmcell_tools"]
# The disk of containerd that outlives dev VMs, shared by the demo and the tests; another dev VM
# than the usual one has a disk of its own.
NAME = os.environ.get("VMCELL_DEV_NAME", "default")
STORE = "make" if NAME == "default" else NAME
UP = [*VMCELL, "dev", "up", "--store", STORE, "--api-port", "0", "--data-port", "0"]
VOLUME_PORT = 3001
READY_WITHIN_S = 180
IMPORT_WITHIN_S = 600


def in_vm(*command: str, timeout_s: int = 300) -> str:
    """Standard output of `command` run in the dev VM; raises HostError with its last lines."""
    words = [*VMCELL, "dev", "run", "--timeout", str(timeout_s), "--", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise HostError(f"{' '.join(command)} in the dev VM ended with {done.returncode}:\n{tail}")
    return done.stdout


def import_image(name: str, namespaces: tuple[str, ...], progress: Progress) -> None:
    """Imports the built image into the VM's containerd, where it has not the same already."""
    # Found on this side: finding it asks apt, which takes long on the emulated CPU.
    image = find_oci_image(name, BuildCache.default(), progress)
    if image is None:
        raise HostError(f"image {name!r} is not built; run: vmcell image build {name}")
    digest = archive_digest(image.archive)
    for namespace in namespaces:
        present = in_vm("ctr", "-n", namespace, "images", "list").splitlines()
        if any(line.startswith(image.reference) and digest in line for line in present):
            continue
        progress.step(f"importing {image.reference} into containerd's namespace {namespace}")
        archive = str(image.archive)
        in_vm("ctr", "-n", namespace, "images", "import", archive, timeout_s=IMPORT_WITHIN_S)


def start_service(api_url: str) -> None:
    """Starts `vmcell serve` in the VM and returns when its API answers."""
    command = " ".join([*VMCELL, "serve"])
    in_vm("sh", "-c", f"setsid {command} > /mnt/out/serve.log 2>&1 < /dev/null &")
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{api_url}/health", timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                tail = in_vm("tail", "-n", "20", "/mnt/out/serve.log")
                raise HostError(
                    f"the API did not answer within {READY_WITHIN_S} s ({error}):\n{tail}"
                ) from error
            time.sleep(0.5)


def stop_service() -> None:
    """Ends the service with SIGTERM and returns when it is gone."""
    # The brackets keep pkill's own shell from matching.
    in_vm("sh", "-c", "pkill -TERM -f '[v]mcell_api.serve'; pidwait -f '[v]mcell_api.serve' || :")


def create_key(team: str) -> str:
    """A fresh API key of the service in the VM."""
    return in_vm(*VMCELL, "key", "create", "--team", team).split()[-1]


@dataclass(frozen=True, kw_only=True)
class ServiceInVm:
    """How the service in the VM is reached from here."""

    api_url: str
    sandbox_url: str
    volume_url: str
    key: str


def bring_up_service(team: str, images: tuple[str, ...], progress: Progress) -> ServiceInVm:
    """The dev VM up, the images in it, the service running and a fresh key for `team`.

    Raises HostError for what does not come up.
    """
    progress.step("bringing the dev VM up")
    # Standard output is the caller's, who may print JSON there.
    up = subprocess.run(UP, check=False, stdout=sys.stderr)
    if up.returncode:
        raise HostError("the dev VM did not come up; its message is above")
    status = json.loads(subprocess.check_output([*VMCELL, "dev", "status", "--json"]))
    for image in images:
        import_image(image, ("vmcell",), progress)
    progress.step("starting noded, the API and nginx in the dev VM")
    api_url = f"http://127.0.0.1:{status['api_port']}"
    start_service(api_url)
    volume_port = forward_port(running_vm(NAME).directory, VOLUME_PORT)
    return ServiceInVm(
        api_url=api_url,
        sandbox_url=f"http://127.0.0.1:{status['data_port']}",
        volume_url=f"http://127.0.0.1:{volume_port}",
        key=create_key(team),
    )
