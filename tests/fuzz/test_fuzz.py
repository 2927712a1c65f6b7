"""Every parser that faces a guest, the network or a file, fuzzed for a while; and the harness.

VMCELL_FUZZ_SECONDS says for how long each; `make fuzz` does it for longer. Two targets run at a
time, each in a process of its own: a test waits for the run that is its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from fuzz_targets import (
    CORPUS,
    GreedyInput,
    SlowInput,
    load,
    reached_by_seeds,
    run_one,
    stored_inputs,
    target_names,
)
from run_fuzz import AT_ONCE, Outcome, fuzz

SECONDS = int(os.environ.get("VMCELL_FUZZ_SECONDS", "20"))
# The same inputs in every run, as far as the machine's speed lets them: news are for `make fuzz`.
SEED = 1
PLANTED_S = 15
NAMES = target_names()
# What tests/api/test_api_cases.py sends as well, and what a program of the host says.
DEEP = {"api_request", "vhost_user"}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """The runs of all targets that are asked for in this session, in the tests' order."""
    wanted = [
        item.callspec.params["target"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_no_findings.__name__
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(fuzz, name, SECONDS, seed=SEED) for name in wanted}


@pytest.mark.timeout(600 + 4 * SECONDS)
@pytest.mark.parametrize(
    "target", [pytest.param(n, marks=pytest.mark.deep) if n in DEEP else n for n in NAMES]
)
def test_no_findings(target: str, runs: dict[str, Future[Outcome]]) -> None:
    outcome = runs[target].result()
    assert outcome.ok, outcome.text
    assert outcome.runs > len(stored_inputs(target)), f"only {outcome.summary()}"


@pytest.mark.parametrize("target", NAMES)
def test_stored_inputs_are_no_findings(target: str) -> None:
    loaded = load(target)
    for path in stored_inputs(target):
        run_one(loaded, path.read_bytes())


@pytest.mark.parametrize("target", NAMES)
def test_seeds_are_taken_and_stored(target: str) -> None:
    loaded = load(target)
    seeds = dict(loaded.seeds())
    refused = [name for name, data in seeds.items() if not run_one(loaded, data)]
    assert not refused
    stored = {path.name: path.read_bytes() for path in (CORPUS / target).iterdir()}
    assert stored == seeds, "run tests/fuzz/make_corpus.py"


@pytest.mark.parametrize("target", NAMES)
def test_seeds_reach_what_they_are_for(target: str) -> None:
    loaded = load(target)
    assert set(loaded.REACHES) <= reached_by_seeds(loaded)


# ---- the harness ------------------------------------------------------------------------------


def test_a_planted_bug_is_found_and_can_be_repeated(tmp_path: Path) -> None:
    outcome = fuzz("planted_bug", PLANTED_S, seed=SEED, out=tmp_path)
    assert not outcome.ok
    assert "ZeroDivisionError" in outcome.text
    assert outcome.found is not None
    (line,) = [line for line in outcome.text.splitlines() if line.startswith("repeat it: ")]
    command = line.removeprefix("repeat it: ").split()
    root = Path(__file__).parents[2]
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "ZeroDivisionError" in again.stderr


def test_a_finding_is_the_programs_status(tmp_path: Path) -> None:
    program = Path(__file__).with_name("run_fuzz.py")
    words = [sys.executable, program, "planted_bug", "--seconds", "15", "--out", tmp_path]
    status = subprocess.run(words, capture_output=True, text=True, check=False)
    assert status.returncode == 1
    assert "ZeroDivisionError" in status.stdout
    assert list(tmp_path.glob("planted_bug-crash-*"))


@pytest.mark.parametrize(
    ("data", "finding"), [(b"slow", SlowInput), (b"big", GreedyInput)], ids=["slow", "big"]
)
def test_what_takes_too_much_is_a_finding(data: bytes, finding: type[Exception]) -> None:
    target = load("planted_greed")
    with pytest.raises(finding):
        run_one(target, data)


@pytest.mark.parametrize(("data", "taken"), [(b"bad", False), (b"good", True)])
def test_what_may_be_refused_is_no_finding(data: bytes, taken: bool) -> None:
    assert run_one(load("planted_greed"), data) is taken


def test_a_run_that_does_not_start_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = fuzz("planted_nothing", 1, out=tmp_path)
    assert not outcome.ok
    assert "ModuleNotFoundError" in outcome.text
