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
import urllib.error
import urllib.request
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.leak_check import Inventory, leaks

VMCELL = [sys.executable, "-m", "vmcell_tools"]
IMAGES = {"small": "docker.io/vmcell/small:latest", "base": "docker.io/vmcell/base:latest"}
# The disk of containerd that outlives dev VMs; `make test` uses the same.
STORE = "make"
READY_WITHIN_S = 180
STEP_WITHIN_S = 900


def say(text: str) -> None:
    """One line of progress, at once."""
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def run_step(*command: str, env: dict[str, str] | None = None) -> None:
    """Runs `command` with its output passed through; raises HostError when it fails."""
    done = subprocess.run(command, env=env, check=False, timeout=STEP_WITHIN_S)
    if done.returncode:
        raise HostError(f"{' '.join(command)} ended with {done.returncode}; its message is above")


def in_vm(*command: str, timeout_s: int = 300) -> str:
    """Standard output of `command` run in the dev VM; raises HostError with its last lines."""
    words = [*VMCELL, "dev", "run", "--timeout", str(timeout_s), "--", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise HostError(f"{' '.join(command)} in the dev VM ended with {done.returncode}:\n{tail}")
    return done.stdout


def _status() -> dict[str, object]:
    output = subprocess.check_output([*VMCELL, "dev", "status", "--json"], text=True)
    status = json.loads(output)
    if not isinstance(status, dict):
        raise HostError(f"vmcell dev status printed {output!r}")
    return status


def import_images() -> None:
    """Imports the two images into the VM's containerd, unless they are there."""
    present = in_vm("ctr", "-n", "vmcell", "images", "list", "-q").split()
    for name, image in IMAGES.items():
        if image not in present:
            say(f"importing {image}")
            in_vm(*VMCELL, "image", "import", name)


def start_service(api_url: str) -> None:
    """Starts `vmcell serve` in the VM and returns when its API answers."""
    command = " ".join([*VMCELL, "serve"])
    in_vm("sh", "-c", f"setsid {command} > /mnt/out/serve.log 2>&1 < /dev/null &")
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{api_url}/health", timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                tail = in_vm("tail", "-n", "20", "/mnt/out/serve.log")
                raise HostError(
                    f"the API did not answer within {READY_WITHIN_S} s ({error}):\n{tail}"
                ) from error
            time.sleep(0.5)


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


def run_demo() -> None:
    """The whole demonstration; raises HostError when a step fails."""
    started = time.monotonic()
    run_step(*VMCELL, "dev", "up", "--store", STORE, "--api-port", "0", "--data-port", "0")
    status = _status()
    api_url = f"http://127.0.0.1:{status['api_port']}"
    sandbox_url = f"http://127.0.0.1:{status['data_port']}"
    import_images()
    say("starting noded, the API and nginx in the dev VM")
    start_service(api_url)
    key = in_vm(sys.executable, "-m", "vmcell_api.keys", "create", "--team", "demo").split()[-1]
    before = _inventory()
    say(f"the dev VM's own kernel: {in_vm('uname', '-r').strip()}")
    run_client(api_url, sandbox_url, key)
    left = leaks(before, _inventory())
    if left:
        raise HostError("the sandbox left something behind:\n" + "\n".join(left))
    say("no process, mount, TAP, snapshot or file of the sandbox is left")
    in_vm("pkill", "-TERM", "-f", "[v]mcell_api.serve")
    say(f"done in {time.monotonic() - started:.0f} s; the dev VM is still up: vmcell dev down")
