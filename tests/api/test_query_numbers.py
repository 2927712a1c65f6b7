"""Whole numbers in queries: what is within bounds comes through, all else is refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.query_numbers import query_number
from vmcell_protos.errors import CallerError

BOUNDS = range(1, 101)


@given(st.integers(1, 100), st.integers(0, 10))
def test_numbers_within_bounds(number: int, zeros: int) -> None:
    assert query_number("limit", "0" * zeros + str(number), BOUNDS) == number


@given(st.text() | st.from_regex(r"0*[0-9]+", fullmatch=True))
def test_a_number_is_in_bounds_or_refused(text: str) -> None:
    number = int(text) if re.fullmatch(r"[0-9]{1,19}", text) else 0
    if number in BOUNDS:
        assert query_number("limit", text, BOUNDS) == number
    else:
        with pytest.raises(CallerError, match="limit") as caught:
            query_number("limit", text, BOUNDS)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        *("", " 5", "5 ", "+5", "-1", "5_0", "5.0", "1e1", "0x5", "\u0665", "\u00b2"),
        *("0", "101", "0" * 12 + "101", "0" * 5000 + "5", "9" * 5000),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(CallerError, match=r"limit is .* from 1 to 100"):
        query_number("limit", text, BOUNDS)
