"""The vm lane's one repetition: only for a guest the software CPU lost, and never twice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {support!r})
import emulator_faults
emulator_faults._software_cpu_logs = lambda: Path({logs!r})
emulator_faults._end_dev_vm = lambda: Path({logs!r}, "console.log").write_text("ended")
emulator_faults._answers = lambda: not Path({logs!r}, "hung").exists()

def pytest_runtest_protocol(item, nextitem):
    return True if emulator_faults.run_once_or_twice(item, nextitem) else None
"""

LOSE_A_GUEST = """
from pathlib import Path
import pytest

runs = []

def lose_a_guest():
    line = f'time="2026-01-01T00:00:0{len(runs)}Z" level=error VMM 12 ended: triple_fault\\n'
    with Path(LOGS, "shim.log").open("a") as log:
        log.write(line)

def lose_the_dev_vm():
    Path(LOGS, "console.log").write_text("[  285.083545] Kernel panic - not syncing: stack end")

def hang_the_dev_vm():
    Path(LOGS, "hung").touch()

def new_dev_vm():
    console = Path(LOGS, "console.log")
    assert not console.exists() or console.read_text() == "ended", "the lost one is taken for it"
    console.write_text("vmcell-dev: ready")
"""


def outcome(folder: Path, module: str) -> tuple[dict[str, int], str]:
    """What pytest counted, and all it said, for one module under the repetition."""
    logs = folder / "logs"
    logs.mkdir()
    (folder / "conftest.py").write_text(CONFTEST.format(support=str(SUPPORT), logs=str(logs)))
    (folder / "test_guest.py").write_text(f"LOGS = {str(logs)!r}\n{LOSE_A_GUEST}\n{module}")
    (folder / "pytest.ini").write_text("[pytest]\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
    )
    last = ran.stdout.strip().splitlines()[-1]
    counts = {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (\w+)", last)}
    return {k: n for k, n in counts.items() if k in ("passed", "failed", "error")}, ran.stdout


def test_test_that_met_a_lost_guest_is_run_once_more_and_says_so(tmp_path: Path) -> None:
    counts, said = outcome(
        tmp_path,
        "def test_boot():\n"
        "    runs.append(1)\n"
        "    if len(runs) == 1:\n"
        "        lose_a_guest()\n"
        "        raise AssertionError('lost')\n",
    )
    assert counts == {"passed": 1}
    assert "test_boot is run again" in said


def test_module_fixture_that_met_one_is_made_again_for_all_its_tests(tmp_path: Path) -> None:
    counts, _ = outcome(
        tmp_path,
        "@pytest.fixture(scope='module')\n"
        "def pod():\n"
        "    runs.append(1)\n"
        "    if len(runs) == 1:\n"
        "        lose_a_guest()\n"
        "        raise RuntimeError('lost')\n"
        "    yield 'pod'\n"
        "def test_one(pod):\n    assert pod == 'pod'\n"
        "def test_two(pod):\n    assert len(runs) == 2\n",
    )
    assert counts == {"passed": 2}


def test_dev_vm_that_panicked_is_made_again(tmp_path: Path) -> None:
    """Whatever the fixtures of the old one say when they are taken down."""
    counts, said = outcome(
        tmp_path,
        "@pytest.fixture(scope='session')\n"
        "def dev_vm():\n"
        "    new_dev_vm()\n"
        "    yield\n"
        "    if len(runs) == 2:\n"
        "        raise RuntimeError('no connection')\n"
        "def test_one(dev_vm):\n    runs.append(1)\n"
        "def test_two(dev_vm):\n"
        "    runs.append(1)\n"
        "    if len(runs) == 2:\n"
        "        lose_the_dev_vm()\n"
        "        raise AssertionError('lost')\n"
        "def test_three(dev_vm):\n    runs.append(1)\n",
    )
    assert counts == {"passed": 3}
    assert "test_two is run again" in said
    assert "no connection" in said


def test_failure_without_a_lost_guest_stands(tmp_path: Path) -> None:
    counts, said = outcome(
        tmp_path, "def test_boot():\n    runs.append(1)\n    assert len(runs) == 2\n"
    )
    assert counts == {"failed": 1}
    assert "run again" not in said


def test_second_failure_stands_even_with_another_lost_guest(tmp_path: Path) -> None:
    counts, _ = outcome(
        tmp_path,
        "def test_boot():\n    runs.append(1)\n    lose_a_guest()\n    assert len(runs) == 3\n",
    )
    assert counts == {"failed": 1}


@pytest.mark.parametrize("scope", ["function", "module"])
def test_fixture_that_cannot_be_taken_down_is_reported(tmp_path: Path, scope: str) -> None:
    counts, said = outcome(
        tmp_path,
        f"@pytest.fixture(scope={scope!r})\n"
        "def pod():\n"
        "    yield\n"
        "    raise RuntimeError('cannot be removed')\n"
        "def test_one(pod):\n"
        "    runs.append(1)\n"
        "    lose_a_guest()\n"
        "    assert len(runs) == 2\n"
        "def test_two():\n    pass\n",
    )
    assert counts.get("passed", 0) >= 1
    assert counts.get("failed", 0) + counts.get("error", 0) >= 1
    assert "cannot be removed" in said
    assert "INTERNALERROR" not in said


def test_dev_vm_that_does_not_answer_is_ended_before_the_repetition(tmp_path: Path) -> None:
    counts, said = outcome(
        tmp_path,
        "def test_boot():\n"
        "    runs.append(1)\n"
        "    if len(runs) == 1:\n"
        "        hang_the_dev_vm()\n"
        "        raise AssertionError('no answer')\n"
        "    assert Path(LOGS, 'console.log').read_text() == 'ended'\n",
    )
    assert counts == {"passed": 1}, said
    assert "does not answer" in said


def test_guest_without_a_shim_is_known_by_what_the_test_says(tmp_path: Path) -> None:
    counts, said = outcome(
        tmp_path,
        "def test_boot():\n"
        "    runs.append(1)\n"
        "    assert len(runs) == 2, 'vmm 27: ended: triple_fault: a fault'\n",
    )
    assert counts == {"passed": 1}, said
