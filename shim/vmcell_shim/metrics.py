"""The guest's cgroup numbers as the metrics containerd knows.

The guest names its numbers as the kernel's files do (cgroup-v2.rst); what containerd's message has
no field for is left out. A number that is no u64 cannot arrive, for the codec keeps to the type; a
sum of what guests say can be more, and is the largest then.
"""

from __future__ import annotations

from vmcell_protos.agent import ContainerStatsResponse
from vmcell_protos.metrics import CPUStat, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat
from vmcell_protos.wellknown import Any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from vmcell_protos.wire import Message

    M = TypeVar("M", bound=Message)

_MOST = (1 << 64) - 1

TYPE_URL = "io.containerd.cgroups.v2.Metrics"


def metrics_of(stats: ContainerStatsResponse) -> Any:
    """What Task.Stats answers."""
    memory = _fill(MemoryStat(), stats.memory)
    memory.usage = stats.memory_usage_bytes
    memory.usage_limit = stats.memory_limit_bytes
    memory.max_usage = stats.memory_peak_bytes
    metrics = Metrics(
        pids=PidsStat(current=stats.pids_current, limit=stats.pids_limit),
        cpu=_fill(CPUStat(), stats.cpu),
        memory=memory,
        io=IOStat(),
        memory_events=_fill(MemoryEvents(), stats.memory_events),
    )
    return Any(type_url=TYPE_URL, value=metrics.encode())


def sum_of(rows: list[ContainerStatsResponse]) -> ContainerStatsResponse:
    """The numbers of several containers of one guest as one. What is no sum is left out: limits
    (the VM's own are another thing) and peaks (nobody knows whether they met)."""
    total = ContainerStatsResponse()
    for row in rows:
        _add(total.cpu, row.cpu)
        _add(total.memory, row.memory)
        _add(total.memory_events, row.memory_events)
        total.memory_usage_bytes = min(_MOST, total.memory_usage_bytes + row.memory_usage_bytes)
        total.pids_current = min(_MOST, total.pids_current + row.pids_current)
    return total


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, value in more.items():
        total[name] = min(_MOST, total.get(name, 0) + value)


def _fill(message: M, values: dict[str, int]) -> M:
    for field in message.FIELDS:
        if field.name in values:
            setattr(message, field.name, values[field.name])
    return message
