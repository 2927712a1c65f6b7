"""The status table: every value against every other."""

from __future__ import annotations

import itertools

import pytest

from vmcell_runtime.virtio.status import next_status

WALK = [0, 1, 3, 11, 15]
ALLOWED = set(itertools.pairwise(WALK))


@pytest.mark.parametrize("current", WALK)
def test_only_the_next_step_reset_or_giving_up(current: int) -> None:
    for written in range(256):
        expected = None
        if written == 0 or (current, written) in ALLOWED or written == current | 128:
            expected = written
        assert next_status(current, written) == expected


@pytest.mark.parametrize("current", [value | bad for value in WALK for bad in (64, 128, 192)])
def test_after_an_error_only_reset(current: int) -> None:
    assert [w for w in range(256) if next_status(current, w) is not None] == [0]
