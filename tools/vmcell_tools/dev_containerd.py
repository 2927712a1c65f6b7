"""containerd in a dev VM: its configuration with CRI for pods, and their network.

CRI listens on TCP too, and its streams (exec, attach, port-forward) on a port that is known, so
that a client on the host reaches both through ssh. Pods get an address by Debian's CNI plugins: a
veth pair into the pod's namespace and a route, no bridge, no packet filter.
Source: containerd docs/cri/config.md (1.6), cni.dev/plugins/current/main/ptp.
"""

from __future__ import annotations

import json

CONFIG_PATH = "/etc/containerd/config.toml"
CNI_PATH = "/etc/cni/net.d/10-pods.conflist"
CRI_PORT, CRI_STREAM_PORT = 10010, 10011
POD_SUBNET = "10.88.0.0/16"
CNI_PLUGINS = "/usr/lib/cni"

CONFIG = f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
# Tracing and foreign snapshotters only make the start slower here.
disabled_plugins = [
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "/run/containerd/containerd.sock"
  tcp_address = "127.0.0.1:{CRI_PORT}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/vmcell/small:latest"
  disable_tcp_service = false
  stream_server_address = "127.0.0.1"
  stream_server_port = "{CRI_STREAM_PORT}"
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "vmcell"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.vmcell]
      runtime_type = "io.containerd.vmcell.v2"
      privileged_without_host_devices = true
      pod_annotations = ["io.vmcell.*"]
      container_annotations = ["io.vmcell.*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""


def files() -> dict[str, bytes]:
    """Absolute path in the VM → content."""
    network = {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": POD_SUBNET}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
    return {CONFIG_PATH: CONFIG.encode(), CNI_PATH: json.dumps(network, indent=1).encode()}
