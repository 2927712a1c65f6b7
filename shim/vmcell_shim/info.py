"""`-info` and `-v`: what this runtime is. Asked by containerd 2.0 on, without an id.

Source: containerd api/types/introspection.proto; docs/mounts.md of 2.2 for the annotation.
"""

from __future__ import annotations

from vmcell_protos.bootstrap import RuntimeInfo, RuntimeVersion
from vmcell_shim.mount_list import HANDLED_TRANSFORMS, HANDLED_TYPES

VERSION = "0.1.0"
NAME = "io.containerd.vmcell.v2"
# containerd 2.2 and 2.3 hand over mounts of these types unmounted.
ALLOW_MOUNTS = "containerd.io/runtime-allow-mounts"


def runtime_info() -> bytes:
    """The answer to `-info`."""
    mounts = ",".join([*(f"{name}/*" for name in HANDLED_TRANSFORMS), *HANDLED_TYPES])
    return RuntimeInfo(
        name=NAME,
        version=RuntimeVersion(version=VERSION),
        annotations={ALLOW_MOUNTS: mounts},
    ).encode()


def version_text(program: str) -> bytes:
    """The answer to `-v`, in the form of containerd's own shims."""
    return f"{program}:\n  Version: {VERSION}\n".encode()
