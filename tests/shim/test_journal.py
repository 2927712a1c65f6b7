"""The shim's log: what a guest says cannot act on a terminal, forge a line or fill a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_shim import journal as journal_module
from vmcell_shim.journal import LINE_CHARACTERS, LINES_PER_WINDOW, Journal, printable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shim.log"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal("", "c1")
    journal.attach(str(path))
    yield journal
    journal.close()


@given(st.text(max_size=60))
def test_printable_text_has_nothing_that_acts(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_long_text_is_cut() -> None:
    assert printable("x" * 100, 10) == "xxxxxxxxxx… (100 characters)"
    assert printable("\x1b" * 9, 10) == r"\x1b\x1b\x… (9 characters)", "its escapes count too"


def test_a_guests_words_stay_in_their_line(journal: Journal, path: Path) -> None:
    journal.warning('it said \x1b[2J\x1b]0;owned\x07\r\nlevel=error msg="forged"\u202e')
    (line,) = path.read_text().splitlines()
    assert line.isprintable()
    assert re.search(r'level=warning msg="it said .*" id=c1$', line)
    assert r"\x1b[2J" in line
    assert r"\u202e" in line


def test_a_line_has_an_end(journal: Journal, path: Path) -> None:
    journal.error("\x1b" * 10 * LINE_CHARACTERS)
    journal.error("after")
    first, second = path.read_text().splitlines()
    assert len(first) < LINE_CHARACTERS + 200
    assert "after" in second


def test_a_flood_is_counted_and_not_written(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    for number in range(3 * LINES_PER_WINDOW):
        journal.info(f"line {number}")
    lines = path.read_text().splitlines()
    assert len(lines) == LINES_PER_WINDOW
    assert "line 0" in lines[0]
    now[0] += journal_module.WINDOW_S
    journal.info("later")
    told, later = path.read_text().splitlines()[LINES_PER_WINDOW:]
    assert f"{2 * LINES_PER_WINDOW} lines were left out" in told
    assert "later" in later
