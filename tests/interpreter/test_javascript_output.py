"""What a run's children print past the driver comes before its end, however late it is read."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from vmcell_interpreter.javascript_kernel.process import JavascriptKernel, Output


def test_what_stands_in_the_pipes_comes_before_the_end() -> None:
    async def scene() -> list[dict[str, Any] | None]:
        kernel = JavascriptKernel(cwd="/", environment={}, typescript=False)
        messages = asyncio.StreamReader()
        messages.feed_data(b'{"type": "end", "id": 1}\n')
        messages.feed_eof()
        read, write = os.pipe()
        kernel._outputs = [Output("stdout", read, kernel._heard.put_nowait)]
        os.write(write, "é\n".encode())
        os.close(write)
        kernel._ended = "so that its messages may end"
        await kernel._read_messages(messages)
        return [kernel._heard.get_nowait() for _ in range(kernel._heard.qsize())]

    assert asyncio.run(scene()) == [
        {"type": "stdout", "text": "é\n"},
        {"type": "end", "id": 1},
    ]


def test_an_output_that_has_ended_is_closed() -> None:
    async def scene() -> None:
        read, write = os.pipe()
        output = Output("stderr", read, lambda _: None)
        output.take()  # nothing is there
        os.close(write)
        output.take()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read)
        output.take()
        output.close()

    asyncio.run(scene())
