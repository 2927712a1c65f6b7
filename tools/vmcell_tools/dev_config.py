"""vmcell's own installation inside a dev VM: what `vmcell setup` would write there, made here.

Running setup in the VM would cost seconds of emulated CPU time. A kernel or base image that is not
built yet is left out; the next `dev run` after the build brings it.
"""

from __future__ import annotations

from vmcell_protos.errors import HostError
from vmcell_shim.config import DEFAULT_PATH, ShimConfig, render_config
from vmcell_tools.progress import Progress
from vmcell_tools.setup_host import SHIM_DIRECTORY, SHIM_NAME, built_artifacts, shim_executable

# Logs outlive the VM there; an emulated guest boots far slower than on hardware.
LOG_DIRECTORY = "/mnt/out/sandboxes"
BOOT_TIMEOUT_S = 180
# QEMU's own resolver; what the host uses may be reachable from the host alone. No snapshots of
# templates: the sandbox that noded makes for one would be a leak to whoever takes an inventory
# meanwhile, and a boot more on an emulated processor. Who wants them writes another file.
API_CONFIG = 'nameservers = ["10.0.2.3"]\ntemplate_snapshots = 0\n'


def vm_configuration(progress: Progress) -> dict[str, bytes]:
    """Absolute path in the VM → content; what cannot be made yet is named by `progress`."""
    files = {"/etc/vmcell/api.toml": API_CONFIG.encode()}
    try:
        files[f"{SHIM_DIRECTORY}/{SHIM_NAME}"] = shim_executable().encode()
    except HostError as error:
        progress.note(f"the VM gets no shim: {error}")
    try:
        artifacts = built_artifacts(progress)
    except HostError as error:
        progress.note(f"the VM gets no {DEFAULT_PATH} yet: {error}")
        return files
    config = ShimConfig(
        kernel=artifacts.kernel,
        base_image=artifacts.base_image,
        log_dir=LOG_DIRECTORY,
        boot_timeout_s=BOOT_TIMEOUT_S,
    )
    return {**files, DEFAULT_PATH: render_config(config).encode()}
