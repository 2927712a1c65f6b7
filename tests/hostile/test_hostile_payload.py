"""A guest that attacks every device of a real VMM, seed by seed; docs/hostile-guest.md.

VMCELL_HOSTILE_SEEDS is how many seeds (20), VMCELL_HOSTILE_SEED the first one (1),
VMCELL_HOSTILE_SECONDS how long each (10). `make test-hostile SEEDS=200` sets them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_payload import build
from hostile_storm import Plan, run_at_once
from tap_lines import TapLine, tap_lines

pytestmark = pytest.mark.kvm

AT_ONCE = 4
FIRST = int(os.environ.get("VMCELL_HOSTILE_SEED", "1"))
COUNT = int(os.environ.get("VMCELL_HOSTILE_SEEDS", "20"))
SECONDS = float(os.environ.get("VMCELL_HOSTILE_SECONDS", "10"))
BROKEN_SECONDS = 4.0
SEEDS = range(FIRST, FIRST + COUNT)
BATCHES = [SEEDS[start : start + AT_ONCE] for start in range(0, COUNT, AT_ONCE)]


# What a VMM could do wrong, and what is said of it then.
BROKEN = {
    "import vmcell_runtime.virtio.rng as m; m.Rng.process = lambda self, queue: 1 // 0": (
        "vmm_error",
        "an exception that is not the guest's fault is in the log",
    ),
    "import vmcell_runtime.virtio.blk as m; kept = []; reset = m.Blk.reset; "
    "m.Blk.reset = lambda self: (kept.append(bytearray(b'x' * 2**20)), reset(self))[1]": (
        "the VMM has grown by",
    ),
    # Not a sleep, for which the jail would end it.
    "import time, vmcell_runtime.virtio.pmem as m; m.until = lambda end: "
    "any(1 for _ in iter(lambda: time.monotonic() < end, False) if not _); "
    "m.Pmem.process = lambda self, queue: m.until(time.monotonic() + 0.3)": ("took",),
    "import vmcell_runtime.virtio.blk as m; "
    "m.Blk._offset = lambda self, sector, length: self._length_bytes": ("the disk has",),
    "import vmcell_runtime.vmm as m; say = m.Reports.__call__; "
    "m.Reports.__call__ = lambda self, line: say(self, line * 1000)": ("the log has",),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("payload"))


@pytest.fixture(scope="module")
def lines() -> Iterator[list[TapLine]]:
    with tap_lines(max(AT_ONCE, len(BROKEN))) as lines:
        yield lines


@pytest.mark.timeout(120 + 10 * SECONDS)
@pytest.mark.parametrize("seeds", BATCHES, ids=[f"seeds-{s[0]}-{s[-1]}" for s in BATCHES])
def test_a_hostile_guest_hurts_only_itself(
    built: bytes, lines: list[TapLine], seeds: range, tmp_path: Path
) -> None:
    plans = []
    for seed, line in zip(seeds, lines, strict=False):
        share = tmp_path / str(seed) / "share" if seed % 4 == 0 and os.geteuid() == 0 else None
        if share is not None:
            share.mkdir(parents=True)
        plans.append(Plan(built, seed, SECONDS, line, share))
    outcomes = run_at_once(plans)
    for outcome in outcomes:
        logging.getLogger("hostile").info("%s", outcome)
    bad = [outcome.report() for outcome in outcomes if outcome.problems or outcome.late]
    assert not bad, "\n\n".join(bad)
    lasted = [outcome for outcome in outcomes if "completed=" in outcome.told]
    assert 2 * len(lasted) >= len(outcomes), "guests that hurt themselves at once show nothing"


def test_a_broken_vmm_is_found(built: bytes, lines: list[TapLine]) -> None:
    plans = [
        Plan(built, 9 * (number + 1), BROKEN_SECONDS, line, None, breakage)
        for number, (breakage, line) in enumerate(zip(BROKEN, lines, strict=False))
    ]
    for outcome, said in zip(run_at_once(plans), BROKEN.values(), strict=True):
        found = "\n".join(outcome.problems + outcome.late)
        for words in said:
            assert words in found, outcome.report()
