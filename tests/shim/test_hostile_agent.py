"""A guest whose agent is an attacker (F14): the shim lives, stays small, and can be ended at once.

VMCELL_HOSTILE_SEEDS says how many agents; each does something else. What must hold of every shim:
it answers to the end, with errors that can be read; it grows by 8 MiB at most; SIGKILL and Delete
are answered within a second; its log has no bug, no forged line and no control character, and is
bounded; it speaks of its own container alone; and another shim's container notices nothing.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from deep import one_in
from hostile_agent import ENDING_LIES, LIES
from shim_process import BOOT_S, ShimProcess, seconds_of

from vmcell_protos import events, task
from vmcell_protos.errors import VmcellError
from vmcell_shim.journal import LINES_PER_WINDOW

SEEDS = int(os.environ.get("VMCELL_HOSTILE_SEEDS", "20"))
MAX_GROWTH_KIB = 8 << 10
# The shim says "on its way" after half a second; the rest is for a machine with other work to do.
# Less than the five that it once waited for a silent agent.
ANSWER_S = 4.5
# SIGKILL that is not carried out, the last of the output, the VM's end.
END_S = 60.0
MAX_OOMS = 60
CALLS = 12
LOG_LINE = re.compile(r'time="[0-9T:.-]+Z" level=(info|warning|error) msg="([^"\\]|\\.)*" id=test')
CONTROL_CHARACTER = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]"
)


@pytest.fixture(scope="module")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShimProcess]:
    """Another shim, whose guest is as it should be."""
    shim = ShimProcess(tmp_path_factory.mktemp("bystander") / "s", "fake_agent.py", {})
    try:
        shim.call("Create", shim.create_request(), task.CreateTaskResponse)
        shim.call("Start", task.StartRequest(id="c1"), task.StartResponse)
        yield shim
        shim.call("Kill", task.KillRequest(id="c1", signal=9))
        shim.call("Wait", task.WaitRequest(id="c1"), task.WaitResponse)
        shim.call("Delete", task.DeleteRequest(id="c1"), task.DeleteResponse)
    finally:
        shim.close()


@pytest.fixture(scope="module")
def told() -> Iterator[list[set[str]]]:
    """The lies of each agent; together they told all there are."""
    told: list[set[str]] = []
    yield told
    if len(told) == SEEDS >= 20:
        assert set().union(*told) == {*LIES, *ENDING_LIES}


def pester(shim: ShimProcess, rng: random.Random) -> None:
    """What containerd asks of a container, in any order; each answer is one that can be read."""
    for number in range(CALLS):
        name = f"e{number}"
        requests = [
            ("State", task.StateRequest(id="c1"), task.StateResponse),
            ("Stats", task.StatsRequest(id="c1"), task.StatsResponse),
            ("Stats", task.StatsRequest(id="c1"), task.StatsResponse),
            ("Pids", task.PidsRequest(id="c1"), task.PidsResponse),
            ("Kill", task.KillRequest(id="c1", signal=15), None),
            ("Kill", task.KillRequest(id="c1", signal=0, all=True), None),
            ("ResizePty", task.ResizePtyRequest(id="c1", width=80, height=24), None),
            ("CloseIO", task.CloseIORequest(id="c1", stdin=True), None),
            ("Exec", shim.exec_request(name), None),
            ("Start", task.StartRequest(id="c1", exec_id=name), task.StartResponse),
            ("Delete", task.DeleteRequest(id="c1", exec_id=name), task.DeleteResponse),
            ("Pause", task.PauseRequest(id="c1"), None),
            ("Resume", task.ResumeRequest(id="c1"), None),
        ]
        picked = requests[8:10] if rng.random() < 0.3 else [rng.choice(requests)]
        for method, request, answer in picked:
            check_error(shim.try_call(method, request, *([answer] if answer else [])))


def check_error(error: VmcellError | None) -> None:
    if error is None:
        return
    text = str(error)
    assert not CONTROL_CHARACTER.search(text)
    assert len(text) < 8192
    assert "bug" not in text


def end(shim: ShimProcess) -> None:
    """SIGKILL, the exit, Delete; a container that was never made needs none of them."""
    state = task.StateRequest(id="c1")
    if shim.try_call("State", state, task.StateResponse) is not None:
        return
    killed = shim.try_call("Resume", task.ResumeRequest(id="c1"))
    check_error(killed)
    kill = task.KillRequest(id="c1", signal=9)
    assert seconds_of(lambda: check_error(shim.try_call("Kill", kill, timeout_s=20))) < ANSWER_S
    exit_ = shim.call("Wait", task.WaitRequest(id="c1"), task.WaitResponse, END_S)
    assert 0 <= exit_.exit_status <= 255
    delete = task.DeleteRequest(id="c1")
    assert seconds_of(lambda: shim.call("Delete", delete, task.DeleteResponse)) < ANSWER_S
    assert shim.try_call("State", state, task.StateResponse) is not None, "it is deleted"


def check_log(shim: ShimProcess) -> None:
    text = shim.log()
    assert "Traceback" not in text, text[-3000:]
    assert not CONTROL_CHARACTER.search(text)
    lines = text.splitlines()
    for line in lines:
        assert LOG_LINE.fullmatch(line), line
    assert len(lines) < 2 * LINES_PER_WINDOW


def check_events(shim: ShimProcess) -> None:
    """Only of its own container, and one exit at most of each process."""
    with shim.containerd.arrived:
        rows = list(shim.containerd.events)
    exits = []
    for _, kind, value in rows:
        event = getattr(events, kind.removeprefix("containerd.events.")).decode(value)
        assert event.container_id == "c1"
        if isinstance(event, events.TaskExit):
            exits.append(event.id)
    assert len(exits) == len(set(exits))
    assert sum(kind.endswith("TaskOOM") for _, kind, _ in rows) <= MAX_OOMS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", one_in(4, range(SEEDS)))
def test_whatever_the_agent_does(
    seed: int, tmp_path: Path, bystander: ShimProcess, told: list[set[str]]
) -> None:
    rng = random.Random(seed)
    behaviour: dict[str, object] = {"seed": seed, "boots": seed % 4 != 0}
    shim = ShimProcess(tmp_path / "s", "hostile_agent.py", behaviour)
    try:
        assert shim.alive()
        before_kib = shim.resident_kib()
        created = shim.try_call(
            "Create", shim.create_request(), task.CreateTaskResponse, BOOT_S + 20
        )
        check_error(created)
        if created is None:
            start = task.StartRequest(id="c1")
            check_error(shim.try_call("Start", start, task.StartResponse, BOOT_S + 20))
            pester(shim, rng)
        state = task.StateRequest(id="c1")
        assert seconds_of(lambda: bystander.call("State", state, task.StateResponse)) < ANSWER_S
        end(shim)
        assert shim.alive()
        # The peak too: what is taken for a moment only can be taken by many shims at once.
        assert shim.resident_kib("VmHWM") - before_kib <= MAX_GROWTH_KIB
        check_log(shim)
        check_events(shim)
        record = shim.directory / "lies"
        lies = record.read_text().splitlines() if record.exists() else []
        told.append({line.split()[0] for line in lies})
    finally:
        shim.close()
    stats = bystander.call("Stats", task.StatsRequest(id="c1"), task.StatsResponse)
    assert stats.stats is not None
