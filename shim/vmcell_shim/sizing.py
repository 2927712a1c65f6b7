"""How many vCPUs, how much memory: annotations first, then the container's limits, then defaults.

A memory limit of the container becomes the VM's memory plus what kernel and agent need themselves,
so that the limit can be reached inside; a CPU quota becomes whole vCPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmcell_protos.errors import CallerError
from vmcell_shim.annotations import PREFIX, Annotations
from vmcell_shim.oci_json import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

MIN_VCPUS, MAX_VCPUS = 1, 8
MIN_MEMORY_MIB, MAX_MEMORY_MIB = 64, 262144
OVERHEAD_MIB = 96
# What Docker asks for at least, too: below it not even a shell starts.
MIN_LIMIT_MIB = 6
# Kubernetes and Docker write "no limit" as a number close to 2**63 rounded to pages.
_UNLIMITED_BYTES = 1 << 62
_POD_RESOURCES = {
    "cpu-quota": ("cpu", "quota"),
    "cpu-period": ("cpu", "period"),
    "memory": ("memory", "limit"),
}


@dataclass(frozen=True, kw_only=True)
class MachineSize:
    """What a VM gets."""

    vcpus: int
    memory_mib: int


def machine_size(
    spec: Json, annotations: Annotations, *, default_vcpus: int, default_memory_mib: int
) -> MachineSize:
    """The size this spec asks for; raises CallerError naming the value and the limits."""
    vcpus, vcpus_source = annotations.vcpus, f"annotation {PREFIX}vcpus"
    if vcpus is None:
        vcpus, vcpus_source = _vcpus_of_quota(spec), "linux.resources.cpu.quota"
    if vcpus is None:
        vcpus, vcpus_source = default_vcpus, "default_vcpus of the configuration"
    if not MIN_VCPUS <= vcpus <= MAX_VCPUS:
        raise CallerError(
            f"{vcpus_source} asks for {vcpus} vCPUs; a microVM has {MIN_VCPUS} to {MAX_VCPUS}"
        )
    memory, memory_source = annotations.memory_mib, f"annotation {PREFIX}memory-mib"
    if memory is None:
        memory, memory_source = _memory_of_limit(spec), "linux.resources.memory.limit"
    if memory is None:
        memory, memory_source = default_memory_mib, "default_memory_mib of the configuration"
    if not MIN_MEMORY_MIB <= memory <= MAX_MEMORY_MIB:
        raise CallerError(
            f"{memory_source} asks for {memory} MiB of memory; "
            f"a microVM has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB"
        )
    return MachineSize(vcpus=vcpus, memory_mib=memory)


def memory_of_update(resources: Json, *, vcpus: int, memory_mib: int) -> int | None:
    """How much of the VM's `memory_mib` new limits leave in use; None when they say nothing of it.

    Raises CallerError for limits beyond the VM: it neither grows nor gets more vCPUs.
    """
    spec = {"linux": {"resources": resources}}
    wanted = _vcpus_of_quota(spec)
    if wanted is not None and wanted > vcpus:
        raise CallerError(
            f"cpu.quota asks for {wanted} vCPUs; the microVM was started with {vcpus} and gets no "
            "more, start it with a higher limit"
        )
    limit = take(spec, "linux.resources.memory.limit", int, 0)
    if limit == 0:
        return None
    needed_mib = _memory_of_limit(spec)
    if needed_mib is None:
        return memory_mib
    if needed_mib - OVERHEAD_MIB > memory_mib:
        raise CallerError(
            f"memory.limit asks for {limit} bytes; the microVM was started with {memory_mib} MiB "
            "and gets no more, start it with a higher limit"
        )
    return min(needed_mib, memory_mib)


def pod_resources(spec: Json) -> Json:
    """`linux.resources` as a pod's annotations state them for all of its containers together.

    Source: containerd pkg/cri/annotations (sandbox-cpu-quota and so on). Raises CallerError.
    """
    found: dict[str, dict[str, int]] = {"cpu": {}, "memory": {}}
    for name, (group, key) in _POD_RESOURCES.items():
        text = take(spec, "annotations", dict, {}).get(f"io.kubernetes.cri.sandbox-{name}")
        if text is None:
            continue
        if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20):
            raise CallerError(f"annotation io.kubernetes.cri.sandbox-{name} is {text!r}, no number")
        found[group][key] = int(text)
    return dict(found)


def _vcpus_of_quota(spec: Json) -> int | None:
    quota = take(spec, "linux.resources.cpu.quota", int, 0)
    period = take(spec, "linux.resources.cpu.period", int, 0) or 100_000
    if quota <= 0 or period < 0:
        return None
    return int(-(-quota // period))


def _memory_of_limit(spec: Json) -> int | None:
    limit = take(spec, "linux.resources.memory.limit", int, 0)
    if limit <= 0 or limit >= _UNLIMITED_BYTES:
        return None
    if limit < MIN_LIMIT_MIB << 20:
        raise CallerError(
            f"linux.resources.memory.limit asks for {limit} bytes of memory; "
            f"a container has {MIN_LIMIT_MIB} MiB at least, its microVM {MAX_MEMORY_MIB} at most"
        )
    return int(-(-limit // (1 << 20))) + OVERHEAD_MIB
