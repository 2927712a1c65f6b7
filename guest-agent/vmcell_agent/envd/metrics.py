"""`GET /metrics`: processor, memory and disk of the guest, from /proc and statvfs(3)."""

from __future__ import annotations

import os
import time

_MIB = 1024 * 1024


def parse_cpu_times(proc_stat: str) -> tuple[int, int]:
    """(busy, all) clock ticks of the first line of /proc/stat (proc(5)); waiting is not busy."""
    ticks = [int(field) for field in proc_stat.splitlines()[0].split()[1:9]]
    idle = sum(ticks[3:5])
    return sum(ticks) - idle, sum(ticks)


def parse_meminfo(meminfo: str) -> dict[str, int]:
    """Bytes by name of /proc/meminfo."""
    found = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        fields = value.split()
        if len(fields) == 2 and fields[1] == "kB":
            found[name] = int(fields[0]) * 1024
    return found


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


class Metrics:
    """Remembers the last processor times: usage is that since the last reading."""

    def __init__(self) -> None:
        self._last = (0, 0)

    def read(self) -> dict[str, object]:
        """Raises OSError where there is no /proc."""
        busy, total = parse_cpu_times(_read("/proc/stat"))
        busy_since, total_since = busy - self._last[0], total - self._last[1]
        if total_since > 0:
            self._last = (busy, total)
        memory = parse_meminfo(_read("/proc/meminfo"))
        used = memory["MemTotal"] - memory.get("MemAvailable", memory["MemFree"])
        disk = os.statvfs("/")
        disk_total = disk.f_blocks * disk.f_frsize
        return {
            "ts": int(time.time()),
            "cpu_count": os.cpu_count() or 1,
            "cpu_used_pct": round(100 * busy_since / max(1, total_since), 2),
            "mem_total": memory["MemTotal"],
            "mem_used": used,
            "mem_cache": memory.get("Cached", 0),
            "mem_total_mib": memory["MemTotal"] // _MIB,
            "mem_used_mib": used // _MIB,
            "disk_used": disk_total - disk.f_bfree * disk.f_frsize,
            "disk_total": disk_total,
        }
