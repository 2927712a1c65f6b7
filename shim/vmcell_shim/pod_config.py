"""CreateSandbox's request → the places of an OCI spec where a sandbox container would say the same.

With `sandboxer = "shim"` there is no sandbox container, and no spec of one: CRI's configuration of
the pod comes as it is. What containerd makes of it for a sandbox container is made here.
Source: containerd internal/cri/server/podsandbox (sandbox_run_linux.go, helpers_linux.go) of 2.x.
"""

from __future__ import annotations

import os

from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError, HostError
from vmcell_protos.sandbox import (
    DNSConfig,
    LinuxContainerResources,
    LinuxPodSandboxConfig,
    NamespaceMode_NODE,
    PodSandboxConfig,
)
from vmcell_protos.wire import WireError
from vmcell_shim.annotations import POD_NAMES, PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.sandbox import CreateSandboxRequest
    from vmcell_shim.oci_json import Json

_TYPE = "runtime.v1.PodSandboxConfig"
_SLICE = ".slice"
_FILE_LIMIT_BYTES = 256 << 10
# Where CRI of 2.x lets everybody listen on low ports and ping, unless the pod says otherwise.
_SYSCTLS = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}


def pod_spec(request: CreateSandboxRequest) -> Json:
    """Annotations, host name, namespaces, cgroup, sysctls; raises CallerError.

    Only annotations that a pod may set of itself: nobody has filtered them, and others name things
    of the host.
    """
    config = _config_of(request)
    linux = config.linux or LinuxPodSandboxConfig()
    given = {**config.annotations, **request.annotations}
    names = [PREFIX + name for name in POD_NAMES]
    annotations = {name: given[name] for name in names if name in given}
    resources = linux.resources or LinuxContainerResources()
    for name, number in (
        ("cpu-period", resources.cpu_period),
        ("cpu-quota", resources.cpu_quota),
        ("memory", resources.memory_limit_in_bytes),
    ):
        if number > 0:
            annotations[f"io.kubernetes.cri.sandbox-{name}"] = str(number)
    return {
        "annotations": annotations,
        "hostname": config.hostname,
        "linux": {
            "namespaces": _namespaces(request, linux),
            "cgroupsPath": _cgroups_path(linux.cgroup_parent, request.sandbox_id),
            "sysctl": {**_SYSCTLS, **linux.sysctls} if config.linux else {},
            "resources": {},
        },
    }


def pod_files(request: CreateSandboxRequest) -> tuple[FileCopy, ...]:
    """The files under /etc that containerd makes for a sandbox container and leaves to the shim
    without one; a member's own mounts come before them. Raises CallerError, HostError."""
    config = _config_of(request)
    dns = config.dns_config or DNSConfig()
    lines = [
        *(f"nameserver {server}" for server in dns.servers),
        *([f"search {' '.join(dns.searches)}"] if dns.searches else []),
        *([f"options {' '.join(dns.options)}"] if dns.options else []),
    ]
    resolv_conf = "".join(f"{line}\n" for line in lines).encode()
    files = {
        "/etc/resolv.conf": resolv_conf or _of_the_host("/etc/resolv.conf"),
        "/etc/hosts": _of_the_host("/etc/hosts"),
        "/etc/hostname": f"{config.hostname}\n".encode() if config.hostname else b"",
    }
    return tuple(
        FileCopy(destination=path, mode=0o644, content=content)
        for path, content in files.items()
        if content
    )


def _of_the_host(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_FILE_LIMIT_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise HostError(f"cannot read {path} for a pod: {error.strerror}") from error


def _config_of(request: CreateSandboxRequest) -> PodSandboxConfig:
    options = request.options
    if options is None or not options.type_url.endswith(_TYPE):
        # A client of the sandbox API that is not CRI may have nothing to say.
        return PodSandboxConfig()
    try:
        return PodSandboxConfig.decode(options.value)
    except WireError as error:
        raise CallerError(f"the options of sandbox {request.sandbox_id}: {error}") from error


def _namespaces(request: CreateSandboxRequest, linux: LinuxPodSandboxConfig) -> list[Json]:
    """No network namespace at all means the host's (OCI config-linux.md)."""
    context = linux.security_context
    options = context.namespace_options if context else None
    if options is not None and options.network == NamespaceMode_NODE:
        return []
    return [{"type": "network", "path": request.netns_path}]


def _cgroups_path(parent: str, sandbox_id: str) -> str:
    if not parent:
        return ""
    name = os.path.basename(parent)
    if name.endswith(_SLICE):
        return f"{name}:cri-containerd:{sandbox_id}"
    return os.path.join(parent, sandbox_id)
