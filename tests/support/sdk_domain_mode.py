"""What a Python program does with nothing but E2B_DOMAIN and E2B_API_KEY; prints one JSON object.

A program of its own, because the SDK's transport has threads for life, which stay in the network
namespace where it was used first.
"""

from __future__ import annotations

import json
import sys

from e2b import Sandbox
from e2b.exceptions import SandboxException, TimeoutException

PATIENCE_S = 30


def main() -> None:
    sandbox = Sandbox.create(template="base", timeout=120, envs={"WHO": "python"})
    told: dict[str, object] = {"id": sandbox.sandbox_id, "host": sandbox.get_host(8080)}
    told["stdout"] = sandbox.commands.run("echo from $WHO; id -un", timeout=PATIENCE_S).stdout
    sandbox.files.write("/tmp/a b", "content é")
    told["read"] = sandbox.files.read("/tmp/a b")
    told["download"] = sandbox.download_url("/tmp/a b")
    lines: list[str] = []
    sandbox.commands.run("seq 300", on_stdout=lines.append, timeout=PATIENCE_S)
    told["streamed"] = "".join(lines)
    told["listed"] = [info.sandbox_id for info in Sandbox.list().next_items()]
    told["was_running"] = sandbox.is_running()
    print(json.dumps(told), flush=True)  # noqa: T201  # what this program is for
    sys.stdin.readline()
    told["killed"] = sandbox.kill()
    told["running"] = sandbox.is_running()
    try:
        sandbox.commands.run("true")
    except (SandboxException, TimeoutException) as error:
        told["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(told), flush=True)  # noqa: T201  # what this program is for


if __name__ == "__main__":
    main()
