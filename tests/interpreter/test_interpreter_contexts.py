"""Contexts over kernels without processes: order, ends, and what a client that leaves causes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import pytest
from fake_kernel import FakeKernel
from hypothesis import given
from hypothesis import strategies as st

from vmcell_interpreter import context as context_module
from vmcell_interpreter.client import Client, ClientGone
from vmcell_interpreter.context import Context
from vmcell_interpreter.contexts import Contexts
from vmcell_interpreter.kernel import KernelFailed
from vmcell_interpreter.lines import END, KEEPALIVE, Line
from vmcell_interpreter.requests import ContextRequest, ExecuteRequest, RequestError


class Room:
    """A context, the kernels it has had, and the tokens that its environment was read with."""

    def __init__(self, *kernels: FakeKernel) -> None:
        self.coming = list(kernels)
        self.kernels: list[FakeKernel] = []
        self.tokens: list[str | None] = []
        self.context = self.make("python", "/")

    def make(self, language: str, cwd: str) -> Context:
        return Context(
            language=language, cwd=cwd, make_kernel=self._kernel, read_environment=self._read
        )

    def _kernel(self) -> FakeKernel:
        self.kernels.append(self.coming.pop(0) if self.coming else FakeKernel())
        return self.kernels[-1]

    async def _read(self, token: str | None) -> dict[str, str]:
        self.tokens.append(token)
        return {"A": "b"}


class Listener:
    """A client that keeps what it is sent."""

    def __init__(self, *, keepalive_s: float = 60) -> None:
        self.lines: list[Line] = []
        self.client = Client(self._take, keepalive_s=keepalive_s)

    async def _take(self, line: Line) -> None:
        self.lines.append(line)

    def kinds(self) -> list[str]:
        return [line["type"] for line in self.lines]


def soon(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


async def until(listener: Listener, kind: str) -> None:
    while kind not in listener.kinds():
        await asyncio.sleep(0)


async def run(room: Room, code: str, listener: Listener, token: str | None = None) -> None:
    await room.context.run(ExecuteRequest(code=code), listener.client, token)


def test_a_kernel_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "INTERRUPT_EVERY_S", 0.01)

    async def work() -> None:
        room, listener, other = Room(), Listener(), Listener()
        deaf = asyncio.create_task(run(room, "deaf", listener))
        await until(listener, "stdout")
        listener.client.gone.set()
        with pytest.raises(ClientGone):
            await deaf
        assert "was killed" in room.kernels[0].ended
        await run(room, "say", other)
        assert other.kinds() == ["stdout", "end_of_execution"]
        assert len(room.kernels) == 2

    soon(work())


def test_a_client_that_leaves_keeps_the_kernel() -> None:
    async def work() -> None:
        room, listener, other = Room(), Listener(), Listener()
        waiting = asyncio.create_task(run(room, "wait", listener))
        await until(listener, "stdout")
        listener.client.gone.set()
        with pytest.raises(ClientGone):
            await waiting
        await run(room, "say", other)
        assert len(room.kernels) == 1
        assert not room.kernels[0].ended

    soon(work())


def test_a_client_that_leaves_does_not_end_the_start() -> None:
    async def work() -> None:
        slow = FakeKernel()
        slow.may_start.clear()
        room, listener = Room(slow), Listener()
        waiting = asyncio.create_task(run(room, "say", listener))
        while not room.kernels:
            await asyncio.sleep(0)
        listener.client.gone.set()
        with pytest.raises(ClientGone):
            await waiting
        slow.may_start.set()
        await run(room, "say", Listener())
        assert room.kernels == [slow]

    soon(work())


def test_a_kernel_that_fails_is_told_and_tried_again() -> None:
    async def work() -> None:
        room, listener, other = Room(FakeKernel(fails=True)), Listener(), Listener()
        await run(room, "say", listener)
        error, end = listener.lines
        assert (error["name"], error["value"]) == ("UnexpectedEndOfExecution", "it fails")
        assert end == END
        await run(room, "say", other)
        assert other.kinds() == ["stdout", "end_of_execution"]

    soon(work())


def test_a_death_is_told_and_the_next_kernel_adopts_again() -> None:
    async def work() -> None:
        room, listener, other = Room(), Listener(), Listener()
        await run(room, "die", listener, "one")
        assert listener.kinds() == ["stdout", "error", "end_of_execution"]
        assert listener.lines[1]["name"] == "ContextRestarting"
        await run(room, "say", other, "two")
        await run(room, "say", other, "three")
        assert room.tokens == ["one", "two"]
        assert [kernel.adopted for kernel in room.kernels] == [[{"A": "b"}]] * 2

    soon(work())


def test_whoever_waits_is_kept_alive() -> None:
    async def work() -> None:
        room, listener, queued = Room(), Listener(), Listener(keepalive_s=0.01)
        first = asyncio.create_task(run(room, "wait", listener))
        await until(listener, "stdout")
        second = asyncio.create_task(run(room, "say", queued))
        await until(queued, "keepalive")
        assert queued.lines[0] == KEEPALIVE
        await room.kernels[0].interrupt()
        await first
        await second
        assert queued.kinds()[-2:] == ["stdout", "end_of_execution"]

    soon(work())


def test_a_context_that_cannot_start_is_none() -> None:
    async def work() -> None:
        room = Room(FakeKernel(fails=True))
        contexts = Contexts(room.make, default_cwd="/")
        before = [context.id for context in contexts.all()]
        with pytest.raises(KernelFailed):
            await contexts.create(ContextRequest())
        assert [context.id for context in contexts.all()] == before
        default = contexts.default("python")
        await contexts.remove(default.id)
        assert contexts.default("python").id != default.id

    soon(work())


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("say", "wait", "die", "leave", "restart", "remove", "interrupt")),
            st.integers(0, 2),
            st.integers(0, 3),
        ),
        max_size=14,
    )
)
def test_any_order_of_calls_comes_to_an_end(steps: list[tuple[str, int, int]]) -> None:
    """`which` context or client a step is for; `pause`: how far the others get meanwhile."""

    async def work() -> None:
        room = Room()
        contexts = Contexts(room.make, default_cwd="/")
        ids = [(await contexts.create(ContextRequest())).id for _ in range(3)]
        runs: list[tuple[Listener, asyncio.Task[None]]] = []
        calls: list[asyncio.Task[None]] = []
        for step, which, pause in steps:
            if step in ("say", "wait", "die"):
                with suppress(RequestError):
                    context = contexts.named(ids[which])
                    listener = Listener()
                    task = context.run(ExecuteRequest(code=step), listener.client, None)
                    runs.append((listener, asyncio.create_task(task)))
            elif step == "leave" and runs:
                runs[which % len(runs)][0].client.gone.set()
            elif step == "restart":
                with suppress(RequestError):
                    calls.append(asyncio.create_task(contexts.named(ids[which]).restart()))
            elif step == "remove":
                calls.append(asyncio.create_task(contexts.remove(ids[which])))
            elif step == "interrupt" and room.kernels:
                await room.kernels[which % len(room.kernels)].interrupt()
            for _ in range(pause):
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, RequestError | KernelFailed | None) for end in outcomes)
        await contexts.close()
        ends = await asyncio.gather(*(task for _, task in runs), return_exceptions=True)
        for (listener, _), end in zip(runs, ends, strict=True):
            if end is None:
                assert listener.lines[-1] == END
                assert listener.kinds().count("end_of_execution") == 1
            else:
                assert isinstance(end, ClientGone)
                assert listener.client.gone.is_set()
        assert all(kernel.ended for kernel in room.kernels if kernel.started.is_set())

    soon(work())
