"""What matplotlib has drawn in one coordinate system, as E2B's chart.

Read from the artists, in this order: wedges are a pie, bar containers bars, whiskers with a median
boxes, collections of points a scatter, lines a line chart. The first kind found is the chart.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from .frames import plain

# "Time (s)", "Speed [m/s]"
_UNIT = re.compile(r"[(\[]([^()\[\]]+)[)\]]\s*$")
_NAMED_TICKS = ("StrCategoryFormatter", "FixedFormatter", "FuncFormatter")

Chart = dict[str, object]


def axes_chart(axes: Any) -> Chart:
    """The chart of a matplotlib Axes; type "unknown" without elements when it holds none."""
    title = axes.get_title()
    if wedges := [patch for patch in axes.patches if type(patch).__name__ == "Wedge"]:
        return {"type": "pie", "title": title, "elements": [_slice(wedge) for wedge in wedges]}
    bars = [held for held in axes.containers if type(held).__name__ == "BarContainer"]
    if bars:
        elements = [bar for container in bars for bar in _bars(axes, container)]
        return {"type": "bar", "title": title, **_labels(axes), "elements": elements}
    if boxes := list(_boxes(axes)):
        return {"type": "box_and_whisker", "title": title, **_labels(axes), "elements": boxes}
    clouds = [held for held in axes.collections if type(held).__name__ == "PathCollection"]
    if clouds:
        kind, points = "scatter", [_cloud(axes, cloud, n) for n, cloud in enumerate(clouds)]
    elif axes.lines:
        kind, points = "line", [_line(axes, line, n) for n, line in enumerate(axes.lines)]
    else:
        return {"type": "unknown", "title": title, "elements": []}
    return {
        "type": kind,
        "title": title,
        **_labels(axes),
        **_ticks("x", axes.xaxis, axes.get_xlim()),
        **_ticks("y", axes.yaxis, axes.get_ylim()),
        "elements": points,
    }


def _labels(axes: Any) -> Chart:
    described: Chart = {}
    for name, label in (("x", axes.get_xlabel()), ("y", axes.get_ylabel())):
        unit = _UNIT.search(label)
        described[f"{name}_label"] = label
        described[f"{name}_unit"] = unit.group(1) if unit else None
    return described


def _ticks(name: str, axis: Any, limits: tuple[float, float]) -> Chart:
    low, high = sorted(limits)
    places = [place for place in axis.get_majorticklocs() if low <= place <= high]
    formatter = axis.get_major_formatter()
    kind = _scale(axis)
    return {
        f"{name}_ticks": [
            _place(axis, place) if kind == "datetime" else float(place) for place in places
        ],
        f"{name}_tick_labels": [str(label) for label in formatter.format_ticks(places)],
        f"{name}_scale": kind,
    }


def _scale(axis: Any) -> str:
    converter = type(_converter(axis)).__name__
    if "Category" in converter:
        return "categorical"
    if "Date" in converter or "Period" in converter:
        return "datetime"
    return str(axis.get_scale())


def _converter(axis: Any) -> object:
    # matplotlib 3.10 gave the attribute a method
    return axis.get_converter() if hasattr(axis, "get_converter") else axis.converter


def _place(axis: Any, value: float) -> object:
    """A number of the axis as what it stands for."""
    kind = _scale(axis)
    if kind == "categorical":
        return str(axis.get_major_formatter().format_ticks([value])[0])
    if kind == "datetime":
        frequency = getattr(axis.axes, "freq", None)
        if frequency is not None:  # pandas counts periods of a length that it leaves here
            period = sys.modules["pandas"].Period(ordinal=int(value), freq=frequency)
            return str(period.to_timestamp().isoformat())
        return str(sys.modules["matplotlib.dates"].num2date(value).isoformat())
    return plain(value)


def _shown(axis: Any, value: Any) -> object:
    """A value of a line as the caller gave it: dates are dates still, categories names."""
    simple = plain(value)
    if isinstance(simple, int | float) and _scale(axis) == "datetime":
        return _place(axis, float(simple))
    return simple


def _nearest_label(axis: Any, value: float) -> str:
    """The name of the tick beside `value`, or the number where ticks have no names."""
    if type(axis.get_major_formatter()).__name__ in _NAMED_TICKS:
        places = list(axis.get_majorticklocs())
        labels = axis.get_major_formatter().format_ticks(places)
        if places:
            nearest = min(range(len(places)), key=lambda number: abs(places[number] - value))
            return str(labels[nearest])
    place = _place(axis, value)
    return f"{place:g}" if isinstance(place, float) else str(place)


def _named(label: str, fallback: str) -> str:
    """matplotlib's own names begin with an underscore and are not shown."""
    return fallback if label.startswith("_") else label


def _slice(wedge: Any) -> Chart:
    return {
        "label": _named(str(wedge.get_label()), ""),
        "angle": float(wedge.theta2 - wedge.theta1),
        "radius": float(wedge.r),
    }


def _bars(axes: Any, container: Any) -> Iterator[Chart]:
    horizontal = container.orientation == "horizontal"
    group = _named(str(container.get_label()), "")
    for bar in container.patches:
        if horizontal:
            middle, value, axis = bar.get_y() + bar.get_height() / 2, bar.get_width(), axes.yaxis
        else:
            middle, value, axis = bar.get_x() + bar.get_width() / 2, bar.get_height(), axes.xaxis
        yield {"label": _nearest_label(axis, middle), "group": group, "value": plain(value)}


def _cloud(axes: Any, cloud: Any, number: int) -> Chart:
    points = [
        [_place(axes.xaxis, float(x)), _place(axes.yaxis, float(y))]
        for x, y in cloud.get_offsets().tolist()
        if x is not None and y is not None
    ]
    return {"label": _named(str(cloud.get_label()), f"Scatter {number + 1}"), "points": points}


def _line(axes: Any, line: Any, number: int) -> Chart:
    xs, ys = (list(line.get_data(orig=True)[place]) for place in (0, 1))
    points = [[_shown(axes.xaxis, x), _shown(axes.yaxis, y)] for x, y in zip(xs, ys, strict=False)]
    return {"label": _named(str(line.get_label()), f"Line {number + 1}"), "points": points}


def _boxes(axes: Any) -> Iterator[Chart]:
    """The boxes of `boxplot`: two whiskers on one line from the box outwards, then the median."""
    drawn = list(axes.lines)
    number = 0
    while number + 1 < len(drawn):
        for across in (0, 1):
            box = _box(axes, drawn[number:], across)
            if box is not None:
                element, used = box
                yield element
                number += used
                break
        else:
            number += 1


def _box(axes: Any, drawn: list[Any], across: int) -> tuple[Chart, int] | None:
    """The box that begins with the first line, and how many lines it took.

    `across` is the coordinate that is the same along a whisker: 0 for upright boxes.
    """
    along = 1 - across
    lower, upper = (line.get_data(orig=False) for line in drawn[:2])
    if not all(len(data[0]) == 2 and data[across][0] == data[across][1] for data in (lower, upper)):
        return None
    middle = lower[across][0]
    (first, low), (third, high) = lower[along], upper[along]
    if upper[across][0] != middle or not low <= first <= third <= high:
        return None
    outliers: list[object] = []
    median = None
    used = 2
    for line in drawn[2:8]:
        data = line.get_data(orig=False)
        if line.get_linestyle() == "None":
            # the mean is a marker too, but within the whiskers
            outliers = [plain(value) for value in data[along] if not low <= value <= high]
            used += 1
            continue
        if len(data[0]) != 2 or data[along][0] != data[along][1]:
            break
        used += 1
        # caps come first and stand at the whiskers' ends
        if used > 4 or data[along][0] not in (low, high):
            median = data[along][0]
    if median is None:
        return None
    axis = axes.xaxis if across == 0 else axes.yaxis
    return {
        "label": _nearest_label(axis, float(middle)),
        "min": plain(low),
        "first_quartile": plain(first),
        "median": plain(median),
        "third_quartile": plain(third),
        "max": plain(high),
        "outliers": outliers,
    }, used
