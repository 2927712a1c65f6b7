"""Wildcard DNS for the clients of a run: every name below `localhost` is this machine.

Imported by the interpreter at its start, because this folder stands in PYTHONPATH. Clients that
know no URL of a service find it by the names `api.<domain>` and `<port>-<id>.<domain>` only.
"""

from __future__ import annotations

import socket

_look_up = socket.getaddrinfo


def _resolve(host, *arguments, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name.rstrip(".").endswith(".localhost"):
        host = "127.0.0.1"
    return _look_up(host, *arguments, **options)


socket.getaddrinfo = _resolve
