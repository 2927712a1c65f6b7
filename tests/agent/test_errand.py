"""Work in a child of the agent's: what it answers, and what becomes of one that does not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from vmcell_agent import errand
from vmcell_agent.errand import Errands
from vmcell_agent.eventloop import Loop
from vmcell_protos.errors import CallerError, HostError, VmcellError


class FewChildren:
    """A reaper of these children alone: the test process has others."""

    def __init__(self) -> None:
        self.ended: dict[int, Callable[[int], None]] = {}

    def expect(self, pid: int, ended: Callable[[int], None]) -> None:
        self.ended[pid] = ended

    def reap(self) -> list[int]:
        """Wait for all of them; their statuses."""
        statuses = []
        for pid, ended in self.ended.items():
            _, status = os.waitpid(pid, 0)
            ended(status)
            statuses.append(status)
        self.ended.clear()
        return statuses


class Bench:
    def __init__(self) -> None:
        self.loop = Loop()
        self.reaper = FewChildren()
        self.errands = Errands(self.loop, self.reaper)  # type: ignore[arg-type]

    def run(
        self, work: Callable[[], bytes], *, seconds: float = 5, most_bytes: int = 0
    ) -> bytes | VmcellError:
        answers: list[bytes | VmcellError] = []

        def done(result: bytes | VmcellError) -> None:
            answers.append(result)
            self.loop.stop()

        self.errands.run("try it", work, done, seconds=seconds, most_bytes=most_bytes)
        self.loop.run()
        (answer,) = answers
        return answer


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.errands.close()
    made.reaper.reap()
    made.loop.close()


def fail(error: BaseException) -> Callable[[], bytes]:
    def work() -> bytes:
        raise error

    return work


def test_the_answer_is_what_the_work_returned(bench: Bench) -> None:
    assert bench.run(lambda: b"") == b""
    assert bench.run(lambda: bytes(3 << 20), most_bytes=3 << 20) == bytes(3 << 20)
    assert bench.reaper.reap() == [0, 0]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CallerError("no such thing", code="not_found"), "not_found", "no such thing"),
        (HostError("x" * 9000), "unavailable", "x" * 4000),
        (RuntimeError("a bug"), "internal", "RuntimeError: a bug"),
        (KeyboardInterrupt(), "internal", "KeyboardInterrupt: "),
    ],
)
def test_an_error_comes_back_with_its_code(
    bench: Bench, error: BaseException, code: str, text: str
) -> None:
    answer = bench.run(fail(error))
    assert isinstance(answer, HostError)
    assert answer.code == code
    assert str(answer).startswith(text)


def test_a_child_that_hangs_is_killed_and_answered(bench: Bench) -> None:
    start = time.monotonic()
    answer = bench.run(lambda: time.sleep(60) or b"", seconds=0.1)
    assert isinstance(answer, HostError)
    assert (answer.code, str(answer)) == ("deadline_exceeded", "try it: not done within 0.1 s")
    assert bench.reaper.reap() == [9]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("last", [b"", b"+", b"+\x05\0\0\0half", b"+\x03\0\0\0more"])
def test_a_child_that_dies_or_speaks_nonsense_is_an_error(bench: Bench, last: bytes) -> None:
    def work() -> bytes:
        pipe = max(fd for fd in range(3, 1000) if _is_open(fd))
        os.write(pipe, last)
        os._exit(1)

    answer = bench.run(work)
    assert isinstance(answer, HostError)
    assert str(answer) == "try it: the process for it was killed"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_an_answer_beyond_its_bound_is_refused(bench: Bench) -> None:
    answer = bench.run(lambda: bytes(1 << 20), most_bytes=1 << 16)
    assert str(answer) == "try it: the answer is too long"


def test_a_child_has_what_it_was_given_and_no_other_descriptor(bench: Bench) -> None:
    keep, other = os.pipe()
    answers: list[bytes | VmcellError] = []

    def work() -> bytes:
        return b" ".join(b"%d" % fd for fd in range(3, 2000) if _is_open(fd))

    def done(result: bytes | VmcellError) -> None:
        answers.append(result)
        bench.loop.stop()

    bench.errands.run("look", work, done, seconds=5, keep=(keep,))
    bench.loop.run()
    assert isinstance(answers[0], bytes)
    assert len(answers[0].split()) == 2  # that one and the pipe it answers through
    assert str(keep).encode() in answers[0].split()
    os.close(keep)
    os.close(other)


def test_errands_are_bounded_and_close_kills_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errand, "MAX_ERRANDS", 2)
    answers: list[bytes | VmcellError] = []

    def one() -> None:
        bench.errands.run("wait", lambda: time.sleep(60) or b"", answers.append, seconds=60)

    one()
    one()
    with pytest.raises(CallerError, match="2 such calls are under way") as error:
        one()
    assert error.value.code == "resource_exhausted"
    bench.errands.close()
    assert bench.reaper.reap() == [9, 9]
    assert answers == []
