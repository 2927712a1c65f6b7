"""Which targets there are, and one input through one of them, watched.

A target is a module `target_<name>.py` here. It has
  `one(data)`   gives the bytes to the parser. It may raise what ALLOWED names: then the input was
                refused as it should be. Anything else is a finding, a false assertion too.
  `ALLOWED`     those exceptions.
  `REACHES`     functions ("module:name") that the seeds must come to: a seed that is misread at its
                beginning is refused by nobody, and tests nothing.
  `seeds()`     valid inputs by name, made from real messages; `one` refuses none of them.
The first line of its docstring says what it feeds, the rest whom that faces and what must hold.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Protocol, cast

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
# Inputs that were findings once; file names say what of.
REGRESSIONS = HERE / "regressions"
MAX_INPUT_BYTES = 8192

# Safety rule MS16 allows 100 ms of processor time per 64 KiB; instrumented code is several times
# slower, and a scheduler's accident must not be a finding.
SLOW_S = 1.0
# The process's peak may rise by that much with one input of 8 KiB.
GREEDY_KIB = 48 << 10


class Target(Protocol):
    """The face of a target's module."""

    ALLOWED: tuple[type[Exception], ...]
    REACHES: tuple[str, ...]

    def one(self, data: bytes) -> None: ...

    def seeds(self) -> Mapping[str, bytes]: ...


class SlowInput(AssertionError):
    """An input that takes more processor time than any input may."""


class GreedyInput(AssertionError):
    """An input that makes the parser allocate out of all proportion."""


def target_names() -> list[str]:
    return sorted(path.stem.removeprefix("target_") for path in HERE.glob("target_*.py"))


def load(name: str) -> Target:
    """The target of that name; also a planted one of the harness's own tests."""
    stem = name if (HERE / f"{name}.py").exists() else f"target_{name}"
    return cast(Target, importlib.import_module(stem))


def stored_inputs(name: str) -> list[Path]:
    """Seeds and former findings of a target."""
    return [
        path
        for folder in (CORPUS / name, REGRESSIONS / name)
        if folder.is_dir()
        for path in sorted(folder.iterdir())
    ]


def reached_by_seeds(target: Target) -> set[str]:
    """The functions that the seeds come to, as in REACHES."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen.add(f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}")

    seeds = target.seeds()
    sys.setprofile(note)
    try:
        for data in seeds.values():
            with suppress(*target.ALLOWED):
                target.one(data)
    finally:
        sys.setprofile(None)
    return seen


def run_one(target: Target, data: bytes) -> bool:
    """Whether the target took the input; False if it refused it. Raises what is a finding."""
    before_s = time.thread_time()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        target.one(data)
        taken = True
    except target.ALLOWED:
        taken = False
    spent_s = time.thread_time() - before_s
    if spent_s > SLOW_S:
        raise SlowInput(f"{len(data)} bytes took {spent_s:.2f} s of processor time")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    if grown_kib > GREEDY_KIB:
        raise GreedyInput(f"{len(data)} bytes made the process grow by {grown_kib} KiB")
    return taken
