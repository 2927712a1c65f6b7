"""Configurations of a containerd of a test's own, for 1.6 and for 2.x.

Sources: containerd docs/cri/config.md, docs/PLUGINS.md (version 3 renames CRI's tables).
"""

from __future__ import annotations

from pathlib import Path

from vmcell_tools.containerd_config import SNIPPETS

_BASE = """
version = {version}
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{directory}/containerd.sock"
  tcp_address = "{tcp}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
"""
_STREAMING = """
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "{port}"
  disable_tcp_service = false
"""
_CRI_2 = """  sandbox_image = "{image}"
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "vmcell"
"""
_CRI_3 = """
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{image}"
[plugins."io.containerd.cri.v1.runtime"]
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "vmcell"
"""
# The same runtime once more, without a sandbox container, and with streams instead of FIFOs.
_SHIM_SANDBOXER = """
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.vmcell-shim]
  runtime_type = "io.containerd.vmcell.v2"
  sandboxer = "shim"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.vmcell-streaming]
  runtime_type = "io.containerd.vmcell.v2"
  sandboxer = "shim"
  io_type = "streaming"
"""
_CRI_PLUGINS = {
    2: ("io.containerd.grpc.v1.cri",),
    3: (
        "io.containerd.grpc.v1.cri",
        "io.containerd.cri.v1.runtime",
        "io.containerd.cri.v1.images",
        "io.containerd.podsandbox.controller.v1.podsandbox",
    ),
}


def configuration(
    directory: Path, *, version: int, cri: bool, image: str, ports: tuple[int, int] = (0, 0)
) -> str:
    """All below `directory`; with `cri`, the runtime's table is the one `vmcell setup` writes.

    `ports` of 127.0.0.1: gRPC's (0: none), and that of CRI's streams (0: any).
    """
    disabled = () if cri else _CRI_PLUGINS[version]
    text = _BASE.format(
        version=version,
        directory=directory,
        disabled=", ".join(f'"{name}"' for name in disabled),
        tcp=f"127.0.0.1:{ports[0]}" if ports[0] else "",
    )
    if not cri:
        return text
    snippet = next(row for row in SNIPPETS if row.version == version)
    own = _CRI_2 if version == 2 else _CRI_3
    text += _STREAMING.format(port=ports[1])
    text += own.format(directory=directory, image=image) + snippet.text
    return text + (_SHIM_SANDBOXER if version == 3 else "")
