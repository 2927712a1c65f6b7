"""One build: what is cached, what is done, how it fails, and what is left."""

from __future__ import annotations

import json
import threading
import time
import uuid
from pathlib import Path

import pytest
from fake_build import FakeGuest, FakeImages, build_run

from vmcell_api.node.build_images import CACHE
from vmcell_api.node.build_records import (
    MAX_ENTRIES,
    BuildRecord,
    BuildResult,
    LineSplitter,
    unfinished,
)
from vmcell_api.node.build_run import BuildRequest, Outcome, StepFailed
from vmcell_api.node.build_steps import Step
from vmcell_protos.errors import HostError

TEAM = "11111111-2222-3333-4444-555555555555"
HASH = "ab" * 32


def run_step(command: str, *more: str, force: bool = False) -> Step:
    return Step(type="RUN", args=(command, *more), force=force)


def _request(*steps: Step, **changes: object) -> BuildRequest:
    values = {
        "build_id": str(uuid.uuid4()),
        "team_id": TEAM,
        "template_id": "t" * 20,
        "from_image": "docker.io/library/debian:12",
        "steps": steps,
    }
    return BuildRequest(**{**values, **changes})  # type: ignore[arg-type]  # test values


class Bench:
    """Images that several builds share, and a guest for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = FakeImages()
        self.guest = FakeGuest()

    def build(self, *steps: Step, **changes: object) -> Outcome:
        self.guest = changes.pop("guest", None) or FakeGuest()  # type: ignore[assignment]  # ours
        more = {name: changes.pop(name) for name in ("deadline", "cancelled") if name in changes}
        self.request = _request(*steps, **changes)
        try:
            return build_run(self.folder, self.images, self.guest, self.request, **more).run()
        finally:
            assert self.guest.ends >= 1, "the machine is always removed"
            assert self.images.leases == []

    def log(self) -> list[str]:
        record = BuildRecord(self.folder / self.request.build_id)
        return [entry.message for entry in record.entries(0, 1000)]

    def commands(self) -> list[str]:
        return [command.text for command in self.guest.ran]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_steps_run_in_order_with_their_surroundings(bench: Bench) -> None:
    outcome = bench.build(
        Step(type="ENV", args=("A", "1", "PATH", "/x:$PATH")),
        Step(type="WORKDIR", args=("/srv",)),
        Step(type="WORKDIR", args=("app",)),
        run_step("make"),
        Step(type="USER", args=("worker",)),
        run_step("install", "root"),
        run_step("test"),
    )
    assert outcome.image == f"vmcell.local/build/{bench.request.build_id}"
    assert (outcome.default_user, outcome.default_workdir) == ("worker", "/srv/app")
    by_text = {command.text: command for command in bench.guest.ran}
    assert by_text["make"].environment == {"PATH": "/x:/bin", "A": "1"}
    assert (by_text["make"].user, by_text["make"].workdir) == ("user", "/srv/app")
    assert by_text["install"].user == "root"
    assert by_text["test"].user == "worker"
    state = bench.images.published[bench.request.build_id]
    assert state.environment == {"PATH": "/x:/bin", "A": "1"}
    # the base's user, two directories, three commands
    assert len(state.layers) == 1 + 1 + 2 + 3
    assert bench.guest.boots == ["docker.io/library/debian:12"]


def test_a_second_build_does_nothing_again(bench: Bench) -> None:
    steps = (run_step("make"), Step(type="ENV", args=("A", "1")), run_step("test"))
    bench.build(*steps, start_command="serve", ready_command="ready")
    first = bench.images.published[bench.request.build_id]
    bench.build(*steps, start_command="serve", ready_command="ready")
    assert bench.guest.boots == []
    assert bench.images.published[bench.request.build_id] == first
    assert [line for line in bench.log() if "CACHED" in line] == [
        "[1/3] CACHED RUN make",
        "[2/3] CACHED ENV A 1",
        "[3/3] CACHED RUN test",
    ]


def test_the_same_beginning_is_reused_and_what_differs_is_done(bench: Bench) -> None:
    bench.build(run_step("make"), run_step("test"))
    bench.build(run_step("make"), run_step("other"))
    assert bench.commands() == ["other"]
    assert bench.guest.boots[0].startswith(CACHE)
    bench.build(run_step("make"), run_step("test", force=True), run_step("last"))
    assert bench.commands() == ["test", "last"]
    bench.build(run_step("make"), run_step("test"), force=True)
    assert bench.commands()[-2:] == ["make", "test"]
    bench.build(run_step("make"), team_id="99999999-2222-3333-4444-555555555555")
    assert bench.commands()[-1] == "make", "teams share nothing"


def test_files_for_copy_go_in_and_count_for_the_cache(bench: Bench) -> None:
    copy = Step(type="COPY", args=("app", "/srv", "", "0644"), files_hash=HASH)
    bench.build(copy)
    assert bench.guest.uploads == [("/.vmcell-copy/files", HASH.encode())]
    assert bench.commands()[-1] == "rm -rf /.vmcell-copy"
    bench.build(copy)
    assert bench.guest.uploads == []
    bench.build(Step(type="COPY", args=copy.args, files_hash="cd" * 32))
    assert len(bench.guest.uploads) == 1


def test_a_failing_command_says_its_last_words(bench: Bench) -> None:
    guest = FakeGuest()
    guest.answers["make"] = (3, "building\n!no rule to make\n")
    with pytest.raises(StepFailed) as caught:
        bench.build(run_step("true"), run_step("make"), run_step("never"), guest=guest)
    assert caught.value.step == "2"
    assert str(caught.value) == (
        "failed to run command 'make': exit status 3\nbuilding\n!no rule to make"
    )
    assert "never" not in bench.commands()
    assert bench.images.published == {}
    record = BuildRecord(bench.folder / bench.request.build_id)
    levels = {entry.message: (entry.level, entry.step) for entry in record.entries(0, 100)}
    assert levels["building"] == ("info", "2")
    assert levels["!no rule to make"] == ("warn", "2")
    bench.build(run_step("true"), run_step("make fixed"))
    assert bench.commands() == ["make fixed"], "what went well is kept"


@pytest.mark.parametrize(
    "step", [run_step("whoami", "root123"), Step(type="USER", args=("root123",))]
)
def test_a_user_that_does_not_exist_has_e2bs_words(bench: Bench, step: Step) -> None:
    with pytest.raises(StepFailed) as caught:
        bench.build(step)
    assert str(caught.value) == (
        "failed to run command 'whoami': command failed: unauthenticated: "
        "invalid username: 'root123'"
    )


def test_an_image_that_cannot_be_had_is_the_bases_fault(bench: Bench) -> None:
    with pytest.raises(StepFailed, match="no such host") as caught:
        bench.build(run_step("make"), from_image="docker.io/library/nosuch:1")
    assert caught.value.step == "base"
    assert bench.guest.boots == []


def test_the_start_command_is_tried_and_its_output_logged(bench: Bench) -> None:
    guest = FakeGuest()
    guest.answers["serve"] = (0, "serving\n")
    bench.build(start_command="serve", ready_command="ready", guest=guest)
    assert {"serve", "ready"} <= set(bench.commands())
    broken = FakeGuest()
    broken.answers = {"crash": (1, "!cannot bind\n"), "never": (1, "not yet\n")}
    with pytest.raises(StepFailed, match="ended before") as caught:
        bench.build(start_command="crash", ready_command="never", guest=broken)
    assert caught.value.step == "finalize"
    assert "!cannot bind" in bench.log()


def test_a_ready_command_that_never_succeeds_ends_with_the_time(bench: Bench) -> None:
    guest = FakeGuest()
    guest.answers["never"] = (5, "not yet\n")
    with pytest.raises(StepFailed, match=r"exit status was 5: not yet|longer than it may"):
        bench.build(ready_command="never", guest=guest, deadline=time.monotonic() + 1.2)


def test_cancelling_ends_the_step_that_runs(bench: Bench) -> None:
    guest, cancelled = FakeGuest(), threading.Event()

    def cancel() -> None:
        assert guest.running.wait(30)
        cancelled.set()
        guest.end()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(StepFailed, match="cancelled"):
        bench.build(run_step("hang"), run_step("never"), guest=guest, cancelled=cancelled)
    thread.join(30)
    assert "never" not in bench.commands()


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    record = BuildRecord(tmp_path / "b1")
    record.create("i" + "1" * 19)
    with pytest.raises(HostError, match="exists") as caught:
        BuildRecord(tmp_path / "b1").create("x")
    assert caught.value.code == "already_exists"
    record.log("info", "one", "base")
    assert [found.build_id for found in unfinished(str(tmp_path))] == ["b1"]
    assert unfinished(str(tmp_path))[0].sandbox_id() == "i" + "1" * 19
    record.log("error", "two", "1")
    record.end(BuildResult(status="error", reason_message="why", reason_step="1"))
    assert unfinished(str(tmp_path)) == []
    result, entries = BuildRecord(tmp_path / "b1").result() or pytest.fail("no result")
    assert (result.reason_message, [entry.message for entry in entries]) == ("why", ["two"])
    (tmp_path / "b1/result.json").write_text("{")
    with pytest.raises(HostError, match=r"result\.json"):
        record.result()
    record.remove()
    record.remove()


def test_a_log_is_bounded_and_says_so(tmp_path: Path) -> None:
    record = BuildRecord(tmp_path / "b1")
    record.create("x")
    for number in range(2200):
        record.log("info", f"{number} " + "x" * 5000, "1")
    lines = record.entries(0, MAX_ENTRIES)
    assert lines[-1].message == "the log is full: what follows is left out"
    assert (tmp_path / "b1/log.jsonl").stat().st_size < 9 << 20
    assert record.last_of("1")[-1].message.startswith("2199 "), "the reason has the last lines"
    assert json.loads((tmp_path / "b1/build.json").read_text()) == {"sandbox_id": "x"}


def test_output_is_cut_into_lines() -> None:
    lines: list[str] = []
    splitter = LineSplitter(lines.append)
    for piece in (b"one\ntw", b"o\r\n10%\r50%\r100%\n", b"\xff\n", b"x" * 5000, b"end"):
        splitter.feed(piece)
    splitter.finish()
    assert lines[:4] == ["one", "two", "100%", "\ufffd"]
    assert "".join(lines[4:]) == "x" * 5000 + "end"
