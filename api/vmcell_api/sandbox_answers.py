"""Sandboxes as E2B's JSON objects: Sandbox, ListedSandbox, SandboxDetail."""

from __future__ import annotations

import datetime

from vmcell_api.node_client import PAUSED, RunningSandbox
from vmcell_api.store.records import SandboxRecord

# The highest version of E2B's envd whose features ours has (clients switch features on by it).
ENVD_VERSION = "0.6.13"
CLIENT_ID = "vmcell"

Json = dict[str, object]


def rfc3339(unix_ms: int) -> str:
    """A moment in UTC with milliseconds and "Z"."""
    moment = datetime.datetime.fromtimestamp(unix_ms / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def sandbox(record: SandboxRecord, domain: str) -> Json:
    """The answer to a create or connect."""
    answer: Json = {
        "sandboxID": record.sandbox_id,
        "templateID": record.template_id,
        "alias": record.template_id,
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "domain": domain or None,
        "trafficAccessToken": record.traffic_token or None,
    }
    if record.access_token:
        answer["envdAccessToken"] = record.access_token
    return answer


def listed(record: SandboxRecord, running: RunningSandbox) -> Json:
    """One entry of a list."""
    return {
        "sandboxID": record.sandbox_id,
        "templateID": record.template_id,
        "alias": record.template_id,
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "startedAt": rfc3339(running.started_at_unix_ms),
        "endAt": rfc3339(running.end_at_unix_ms),
        "cpuCount": running.vcpus,
        "memoryMB": running.memory_mib,
        "diskSizeMB": running.disk_mib,
        "metadata": record.metadata,
        "state": "paused" if running.state == PAUSED else "running",
        "volumeMounts": [
            {"name": mount.name, "path": mount.path} for mount in running.volume_mounts
        ],
    }


def detail(record: SandboxRecord, running: RunningSandbox, domain: str) -> Json:
    """The answer to `GET /sandboxes/{id}`."""
    answer = listed(record, running)
    answer["domain"] = domain or None
    answer["allowInternetAccess"] = running.egress.allow_internet
    answer["network"] = {
        "allowOut": list(running.egress.allow_out),
        "denyOut": list(running.egress.deny_out),
        "allowPublicTraffic": not record.traffic_token,
    }
    answer["lifecycle"] = {
        "autoResume": running.auto_resume,
        "onTimeout": "pause" if running.pause_on_timeout else "kill",
    }
    if record.access_token:
        answer["envdAccessToken"] = record.access_token
    return answer
