"""A kernel that answers a question late, at the very moment when the next one is asked.

Run by the code interpreter's own Python: `late_kernel.py kernel FILE` is the kernel, Jupyter's
protocol and nothing behind it; `late_kernel.py` starts it as the server would, runs code twice, and
prints what came of the second run as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import zmq
from jupyter_client.session import Session

from vmcell_interpreter.jupyter_kernel import JupyterKernel, KernelProgram

LATE_S = 0.2
WITHIN_S = 20.0


def kernel(connection_file: str) -> None:
    """Answers requests; 0.2 s after an answer to "late" comes another one, to nobody's question."""
    connection = json.loads(Path(connection_file).read_text())
    session = Session(key=connection["key"].encode())
    context = zmq.Context()
    shell, iopub = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
    shell.bind(f"ipc://{connection['ip']}-{connection['shell_port']}")
    iopub.bind(f"ipc://{connection['ip']}-{connection['iopub_port']}")
    while True:
        caller, request = session.recv(shell, mode=0)
        content, kind = request["content"], request["header"]["msg_type"]
        reply = kind.replace("_request", "_reply")
        session.send(iopub, "status", {"execution_state": "busy"}, parent=request)
        session.send(shell, reply, {"status": "ok"}, parent=request, ident=caller)
        session.send(iopub, "status", {"execution_state": "idle"}, parent=request)
        if content.get("code") == "late":
            time.sleep(LATE_S)
            session.send(shell, "kernel_info_reply", {"status": "ok"}, ident=caller)


async def second_run() -> str:
    """ "over" when the second run came to its end, else "hung"."""
    program = KernelProgram(
        argv=(sys.executable, __file__, "kernel", "{connection_file}"),
        language="late",
        adopt=str,
        enter=str,
        leave=str,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = JupyterKernel(program, cwd=folder, environment=os.environ)
        await found.start()
        try:
            async for _ in found.run("late", {}):
                pass
            # The loop stands still until the late answer is here, as it does on a busy machine.
            time.sleep(3 * LATE_S)
            async with asyncio.timeout(WITHIN_S):
                async for _ in found.run("next", {}):
                    pass
        except TimeoutError:
            return "hung"
        finally:
            await found.stop("the test is over")
    return "over"


if __name__ == "__main__":
    if sys.argv[1:2] == ["kernel"]:
        kernel(sys.argv[2])
    else:
        sys.stdout.write(json.dumps(asyncio.run(second_run())))
