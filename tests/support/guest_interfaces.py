"""A network namespace with interfaces like a guest's, and `configure` run inside it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agent_harness import ROOT, run

from vmcell_protos.agent import ConfigureGuestRequest, Interface

MAC = "02:00:00:00:00:07"
MAC_2 = "02:00:00:00:00:08"


@contextmanager
def two_interfaces() -> Iterator[str]:
    """A network namespace with two interfaces of addresses MAC and MAC_2, their peers up."""
    name = f"vmcell-agent-{os.getpid()}"
    run("ip", "netns", "add", name)
    try:
        for mac, link, far in ((MAC, "raw0", "far"), (MAC_2, "raw1", "far1")):
            run("ip", "-n", name, "link", "add", link, "address", mac, "type", "veth", "peer", far)
            run("ip", "-n", name, "link", "set", far, "up")
        yield name
    finally:
        run("ip", "netns", "delete", name)


def configure_in(namespace: str, *interfaces: Interface) -> str:
    """Run `configure` inside; the error's sentence, "" for none."""
    request = ConfigureGuestRequest(interfaces=list(interfaces)).encode()
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'guest-agent'), str(ROOT / 'protos')]!r}\n"
        "from vmcell_agent.network import configure, loopback_up, plan\n"
        "from vmcell_protos.agent import ConfigureGuestRequest\n"
        "from vmcell_protos.errors import VmcellError\n"
        "loopback_up()\n"
        f"try: configure(plan(ConfigureGuestRequest.decode({request!r}).interfaces))\n"
        "except VmcellError as error: print(error)\n"
    )
    return run("ip", "netns", "exec", namespace, sys.executable, "-I", "-S", "-B", "-c", code)


def shown(namespace: str, *words: str) -> Any:
    return json.loads(run("ip", "-json", "-n", namespace, *words))
