"""One connection that listens to a run: lines go out, silence is filled, its end is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from .lines import KEEPALIVE, Line

KEEPALIVE_S = 5.0

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection."""


class Client:
    """`send` writes a line and raises ClientGone when it cannot; `gone` is set at a close.

    `keepalive_s` is the silence after which a line goes out.
    """

    def __init__(
        self, send: Callable[[Line], Awaitable[None]], *, keepalive_s: float = KEEPALIVE_S
    ) -> None:
        self._send = send
        self._keepalive_s = keepalive_s
        self.gone = asyncio.Event()

    async def send(self, line: Line) -> None:
        """Writes one line."""
        if self.gone.is_set():
            raise ClientGone
        await self._send(line)

    async def wait(self, call: Coroutine[Any, Any, T]) -> T:
        """The call's result, keepalives meanwhile; cancels it and raises ClientGone at a close."""
        task = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(self.gone.wait())
        try:
            while True:
                done, _ = await asyncio.wait(
                    {task, gone}, timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if task in done:
                    return task.result()
                if gone in done:
                    raise ClientGone
                await self.send(KEEPALIVE)
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
