"""Descriptions without typing: fields, defaults, equality, no change."""

from __future__ import annotations

import pytest

from vmcell_agent.record import Record


class Point(Record):
    x: int
    y: int
    names: tuple[str, ...] = ()


def test_fields_by_place_and_by_name() -> None:
    point = Point(1, y=2)
    assert (point.x, point.y, point.names) == (1, 2, ())
    assert point == Point(1, 2, ()) != Point(1, 2, ("a",))
    assert point != (1, 2, ())
    assert point.replace(y=3) == Point(x=1, y=3)
    assert repr(point) == "Point(x=1, y=2, names=())"


def test_a_field_cannot_be_changed() -> None:
    point = Point(1, 2)
    with pytest.raises(AttributeError, match=r"Point\.x cannot be changed"):
        point.x = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1,), {}), ((1, 2, (), 4), {}), ((1, 2), {"x": 1}), ((1, 2), {"z": 1})],
)
def test_missing_surplus_and_unknown_fields_are_errors(
    values: tuple[object, ...], named: dict[str, object]
) -> None:
    with pytest.raises(TypeError, match=r"has the fields x, y, names|multiple values"):
        Point(*values, **named)  # type: ignore[arg-type]
