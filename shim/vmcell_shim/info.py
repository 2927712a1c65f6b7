"""`-info` and `-v`: what this runtime is. Asked by containerd 2.0 on, without an id.

Source: containerd api/types/introspection.proto; reference: shim-contract 1.4.
"""

from __future__ import annotations

from vmcell_protos.bootstrap import RuntimeInfo, RuntimeVersion

VERSION = "0.1.0"
NAME = "io.containerd.vmcell.v2"


def runtime_info() -> bytes:
    """The answer to `-info`."""
    return RuntimeInfo(name=NAME, version=RuntimeVersion(version=VERSION)).encode()


def version_text(program: str) -> bytes:
    """The answer to `-v`, in the form of containerd's own shims."""
    return f"{program}:\n  Version: {VERSION}\n".encode()
