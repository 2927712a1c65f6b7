"""The sandbox's global environment as envd has it now, asked with the token a client showed.

The server's own environment is from its start; a sandbox made from a snapshot has another by then.
"""

from __future__ import annotations

import json
import logging

from tornado.httpclient import AsyncHTTPClient, HTTPClientError

log = logging.getLogger("vmcell.interpreter")

ENVS_URL = "http://127.0.0.1:49983/envs"
WITHIN_S = 10.0


async def sandbox_environment(token: str | None) -> dict[str, str]:
    """envd's variables; none, with a line in the log, when it does not tell.

    Old clients show no token, and a sandbox that has one then keeps its variables to itself.
    """
    headers = {"X-Access-Token": token} if token else {}
    try:
        answer = await AsyncHTTPClient().fetch(ENVS_URL, headers=headers, request_timeout=WITHIN_S)
        found = json.loads(answer.body)
    except (HTTPClientError, OSError, ValueError) as error:
        log.warning("envd did not tell the sandbox's environment: %s", error)
        return {}
    if not isinstance(found, dict):
        log.warning("envd answered with something else than an environment")
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}
