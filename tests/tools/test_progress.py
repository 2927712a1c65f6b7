"""Progress in a log: one line per step at its beginning."""

from __future__ import annotations

import pytest

from vmcell_tools.progress import Progress


def test_steps_are_lines_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("build") as progress:
        progress.step("one")
        assert capfd.readouterr().err == "build: one\n"
        progress.step("two")
        assert progress.current == "two"
        progress.note("found [a] thing")
    assert capfd.readouterr() == ("", "build: two\nbuild: found [a] thing\n")


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("build", quiet=True) as progress:
        progress.step("one")
        progress.note("two")
    assert capfd.readouterr() == ("", "")
