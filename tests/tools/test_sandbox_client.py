"""Pure parts of `vmcell sandbox`: the metadata filter, times and spans in tables."""

from __future__ import annotations

import time
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.sandbox_bodies import parse_list_query
from vmcell_tools.cli_output import plain
from vmcell_tools.sandbox_client import metadata_query
from vmcell_tools.sandbox_tables import mib, moment, span

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.dictionaries(_TEXT, _TEXT, max_size=4))
def test_any_metadata_reaches_the_api_as_it_is(metadata: dict[str, str]) -> None:
    query = urlencode({"metadata": metadata_query(metadata)})
    assert parse_list_query(query).metadata == metadata


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((-5, "0 s"), (0, "0 s"), (119.6, "120 s"), (120, "2 min"), (7199, "119 min")),
        *((7200, "2 h"), (172799, "47 h"), (172800, "2 d"), (34560000, "400 d")),
    ],
)
def test_span(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert moment("2026-11-26T23:30:00.500Z") == "2026-11-27 01:30:00"
        assert moment("[soon]") == r"\[soon]"
    finally:
        monkeypatch.undo()
        time.tzset()
    assert mib(3 << 19) == "1.5 MiB"


@given(st.text())
def test_plain_is_printable(text: str) -> None:
    assert plain(text).isprintable()
    assert text.isprintable() == (plain(text) == text)
