"""A matplotlib figure as E2B's chart: one coordinate system alone, or a superchart of several."""

from __future__ import annotations

from typing import Any

from .axes import Chart, axes_chart

# More would be megabytes of JSON beside a picture that cannot show them.
MAX_POINTS = 100_000


def figure_chart(figure: Any) -> Chart | None:
    """The chart of a Figure; None when it has nothing in it, or more than MAX_POINTS points."""
    shown = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    if not shown or sum(_point_count(axes) for axes in shown) > MAX_POINTS:
        return None
    charts = [axes_chart(axes) for axes in shown]
    if len(charts) == 1:
        return charts[0]
    return {"type": "superchart", "title": _title(figure), "elements": charts}


def _point_count(axes: Any) -> int:
    lines = sum(len(line.get_xdata(orig=False)) for line in axes.lines)
    return lines + len(axes.patches) + sum(len(held.get_offsets()) for held in axes.collections)


def _title(figure: Any) -> str:
    return str(figure.get_suptitle()) if hasattr(figure, "get_suptitle") else ""
