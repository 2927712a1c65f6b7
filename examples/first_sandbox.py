"""A first sandbox with the unmodified E2B SDK: `pip install e2b`, set three variables, run this.

E2B_API_URL      where the control plane listens, e.g. http://127.0.0.1:3000
E2B_SANDBOX_URL  where sandboxes are reached, e.g. http://127.0.0.1:3080
E2B_API_KEY      a key, e.g. from `vmcell key create --team me`
"""

from __future__ import annotations

import os
import sys
import time

from e2b import CommandExitException, Sandbox

# A cold boot on an emulated CPU takes longer than the SDK's default of 60 s allows for.
PATIENCE_S = 300


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    started = time.monotonic()
    with Sandbox.create(template="base", timeout=600, request_timeout=PATIENCE_S) as sandbox:
        show(f"sandbox {sandbox.sandbox_id} created in {time.monotonic() - started:.1f} s")

        release = sandbox.commands.run("uname -r", timeout=PATIENCE_S).stdout.strip()
        show(f"the guest's kernel: {release}")

        content = os.urandom(1 << 20)
        sandbox.files.write("/tmp/blob", content, request_timeout=PATIENCE_S)
        read_back = bytes(sandbox.files.read("/tmp/blob", "bytes", request_timeout=PATIENCE_S))
        if read_back != content:
            raise SystemExit("the file that came back is not the file that was written")
        show(f"wrote and read {len(content)} bytes: equal")

        lines: list[str] = []
        sandbox.commands.run(
            "for i in 1 2 3; do echo line $i; sleep 0.2; done",
            on_stdout=lambda chunk: lines.append(chunk),
            timeout=PATIENCE_S,
        )
        show(f"streamed: {lines}")

        try:
            sandbox.commands.run("echo to stderr >&2; exit 3", timeout=PATIENCE_S)
        except CommandExitException as error:
            show(f"exit code {error.exit_code}, stderr {error.stderr.strip()!r}")

        listed = [info.sandbox_id for info in Sandbox.list().next_items()]
        show(f"listed: {sandbox.sandbox_id in listed} ({len(listed)} running)")
        if sandbox.sandbox_id not in listed:
            raise SystemExit("the sandbox is missing from the list")
    show(f"killed; is it still listed? {sandbox.sandbox_id in _listed()}")


def _listed() -> list[str]:
    return [info.sandbox_id for info in Sandbox.list().next_items()]


if __name__ == "__main__":
    main()
