"""State machines whose runs are strings of bytes: Hypothesis makes and shrinks them, cheaply.

Hypothesis' own `RuleBasedStateMachine` draws each rule and each argument by itself, which costs
more than the steps do: 9 ms for 50 steps that do nothing. Here a run is one draw, 8 bytes a step:
the first says which step, the others are its numbers. A step of zeros does nothing, so a run
shrinks to the steps that matter.

`make test` does 10,000 runs of 50 steps, the same ones every time, shared among the machines
(SHARES). `make test-state-machines` does as many as VMCELL_STATE_MACHINE_RUNS says, others each
time; a run that fails is printed with its steps and its bytes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

STEPS = 50
STEP_BYTES = 8
RUN_BYTES = (1 + STEPS) * STEP_BYTES
USUAL_RUNS = 10_000

SHARES = {
    "queue": 3000,
    "transport": 2000,
    "memory": 700,
    "rng": 700,
    "pmem": 600,
    "balloon": 700,
    "blk": 800,
    "net": 700,
    "vsock": 600,
    "fs": 200,
}
"""Runs of each machine in `make test`; their sum is USUAL_RUNS."""


class Choices:
    """The numbers of one step, taken from its bytes; behind these come ever new ones from them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._more: random.Random | None = None

    def _byte(self) -> int:
        if self._position < len(self._data):
            self._position += 1
            return self._data[self._position - 1]
        if self._more is None:
            self._more = random.Random(self._data)
        return self._more.randrange(256)

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        number = self._byte()
        reach = 256
        while reach < limit:
            number = number << 8 | self._byte()
            reach <<= 8
        return number % limit

    def flag(self, one_in: int = 2) -> bool:
        """True once in `one_in` times."""
        return self._byte() % one_in == one_in - 1

    def of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]


Step = Callable[[Any, Choices], None]


def step(weight: int = 1) -> Callable[[Step], Step]:
    """Makes a method of a StepMachine one of its steps, `weight` times as likely as another."""

    def mark(method: Step) -> Step:
        method.weight = weight  # type: ignore[attr-defined]  # read below
        return method

    return mark


class StepMachine:
    """What is tested, and what is known of it. `check` holds after each step."""

    def set_up(self, choices: Choices) -> None:
        """Makes it all anew; nothing of an earlier run may matter."""

    def check(self) -> None: ...

    def finish(self) -> None:
        """What must hold at the end of a run that broke nothing."""

    def tear_down(self) -> None: ...

    @classmethod
    def steps(cls) -> list[Step | None]:
        """What the first byte of a step chooses from; 0 is nothing."""
        marked = [getattr(cls, name) for name in dir(cls)]
        return [None, *(s for s in marked for _ in range(getattr(s, "weight", 0)))]


def drive(kind: type[StepMachine], run: bytes) -> None:
    """One run. What fails carries the names of the steps up to there."""
    steps = kind.steps()
    machine = kind()
    done: list[str] = []
    try:
        machine.set_up(Choices(run[:STEP_BYTES]))
        for start in range(STEP_BYTES, RUN_BYTES, STEP_BYTES):
            chosen = steps[run[start] % len(steps)]
            if chosen is None:
                continue
            data = run[start + 1 : start + STEP_BYTES]
            done.append(f"{chosen.__name__}({data.hex()})")
            chosen(machine, Choices(data))
            machine.check()
        machine.finish()
    except BaseException as error:
        error.add_note(f"{kind.__name__}({run[:STEP_BYTES].hex()}): {', '.join(done)}")
        raise
    finally:
        machine.tear_down()


def machine_test(kind: type[StepMachine], share: str) -> Callable[[], None]:
    """A test that does the runs of `kind`; fewer than its share is a failure too."""
    asked = os.environ.get("VMCELL_STATE_MACHINE_RUNS", "")
    wanted = max(1, SHARES[share] * int(asked or USUAL_RUNS) // USUAL_RUNS)
    done = 0

    @settings(
        max_examples=wanted,
        derandomize=not asked,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(run=st.binary(min_size=RUN_BYTES, max_size=RUN_BYTES))
    def runs(run: bytes) -> None:
        nonlocal done
        done += 1
        drive(kind, run)

    @pytest.mark.timeout(900)
    def test() -> None:
        runs()
        assert done >= wanted, f"{done} runs of {wanted}"

    return test
