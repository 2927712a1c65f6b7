"""The process: `python -m vmcell_interpreter [--port N] [--cwd DIRECTORY]`.

It listens first and starts the Python kernel then, so that the sandbox is ready long before the
kernel is; a run that comes earlier waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys

from tornado.httpserver import HTTPServer

from .context import Context
from .contexts import DEFAULT_CWD, Contexts
from .kernel import KernelFailed
from .kernel_choice import make_kernel
from .languages import PYTHON
from .requests import MAX_BODY_BYTES
from .sandbox_env import sandbox_environment
from .server import application

PORT = 49999
# Clients keep idle connections for 300 s; one that is closed just then fails a request.
IDLE_S = 640
CLOSE_S = 10.0
# Variables of the server that are none of the code's business.
OWN_VARIABLES = ("PYTHONDONTWRITEBYTECODE", "OLDPWD", "SHLVL", "_")

log = logging.getLogger("vmcell.interpreter")


def make_context(language: str, cwd: str) -> Context:
    """A context of the sandbox's environment."""
    environment = {name: text for name, text in os.environ.items() if name not in OWN_VARIABLES}
    return Context(
        language=language,
        cwd=cwd,
        make_kernel=lambda: make_kernel(language, cwd, environment),
        read_environment=lambda token: _news(token, environment),
    )


async def _news(token: str | None, environment: dict[str, str]) -> dict[str, str]:
    """The variables that envd has and a kernel of `environment` has not."""
    found = await sandbox_environment(token)
    return {name: text for name, text in found.items() if environment.get(name) != text}


async def serve(port: int, cwd: str) -> None:
    """Serves until SIGTERM or SIGINT, then ends all kernels."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    contexts = Contexts(make_context, default_cwd=cwd)
    server = HTTPServer(
        application(contexts),
        idle_connection_timeout=IDLE_S,
        max_buffer_size=MAX_BODY_BYTES,
        max_body_size=MAX_BODY_BYTES,
    )
    server.listen(port)
    log.info("serving on port %d", port)
    first = asyncio.create_task(_first_kernel(contexts))
    await stopping.wait()
    server.stop()
    first.cancel()
    try:
        async with asyncio.timeout(CLOSE_S):
            await contexts.close()
    except TimeoutError:
        log.warning("a kernel did not end within %.0f s; it ends with this process", CLOSE_S)


async def _first_kernel(contexts: Contexts) -> None:
    """Most runs are Python's, and the first of them shall not wait for its start."""
    try:
        await contexts.default(PYTHON).ready()
    except KernelFailed as error:
        log.error("the first kernel did not start, the first run will try again: %s", error)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="vmcell_interpreter", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--cwd", default=DEFAULT_CWD)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    asyncio.run(serve(given.port, given.cwd))
    return 0


if __name__ == "__main__":
    sys.exit(main())
