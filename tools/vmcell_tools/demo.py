"""`vmcell demo`: an unmodified E2B client runs commands in a real microVM, inside the dev VM.

Brings the dev VM and the service in it up, runs `examples/first_sandbox.py` on this host with the
three environment variables a user would set, and checks that the sandbox left nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.dev_service import (
    UP,
    VMCELL,
    create_key,
    import_image,
    in_vm,
    start_service,
    stop_service,
)
from vmcell_tools.leak_check import Inventory, leaks
from vmcell_tools.progress import Progress

STEP_WITHIN_S = 900


def run_step(*command: str, env: dict[str, str] | None = None) -> None:
    """Runs `command` with its output passed through; raises HostError when it fails."""
    done = subprocess.run(command, env=env, check=False, timeout=STEP_WITHIN_S)
    if done.returncode:
        raise HostError(f"{' '.join(command)} ended with {done.returncode}; its message is above")


def _status() -> dict[str, object]:
    output = subprocess.check_output([*VMCELL, "dev", "status", "--json"], text=True)
    status = json.loads(output)
    if not isinstance(status, dict):
        raise HostError(f"vmcell dev status printed {output!r}")
    return status


def _inventory() -> Inventory:
    found = json.loads(in_vm(sys.executable, "-m", "vmcell_tools.leak_check"))
    if not isinstance(found, dict):
        raise HostError("the leak check printed something else than an inventory")
    return found


def run_client(api_url: str, sandbox_url: str, key: str) -> None:
    """Runs the example on this host, as its user would."""
    example = Path(__file__).resolve().parents[2] / "examples" / "first_sandbox.py"
    environment = {
        **os.environ,
        "E2B_API_URL": api_url,
        "E2B_SANDBOX_URL": sandbox_url,
        "E2B_API_KEY": key,
    }
    run_step(sys.executable, str(example), env=environment)


def say(text: str) -> None:
    """One line of the demo's own story."""
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def run_demo() -> None:
    """The whole demonstration; raises HostError when a step fails."""
    started = time.monotonic()
    run_step(*UP)
    status = _status()
    api_url = f"http://127.0.0.1:{status['api_port']}"
    with Progress("demo") as progress:
        for name in ("small", "base"):
            import_image(name, ("vmcell",), progress)
        progress.step("starting noded, the API and nginx in the dev VM")
        start_service(api_url)
        progress.step("making an API key, taking an inventory of the dev VM")
        key = create_key("demo")
        before = _inventory()
    say(f"the dev VM's own kernel: {in_vm('uname', '-r').strip()}")
    run_client(api_url, f"http://127.0.0.1:{status['data_port']}", key)
    left = leaks(before, _inventory())
    if left:
        raise HostError("the sandbox left something behind:\n" + "\n".join(left))
    say("no process, mount, TAP, snapshot or file of the sandbox is left")
    stop_service()
    say(f"done in {time.monotonic() - started:.0f} s; the dev VM is still up: vmcell dev down")
