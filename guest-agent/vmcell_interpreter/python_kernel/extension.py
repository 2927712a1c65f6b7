"""The IPython extension: formatters for E2B's `chart`, `data` and `json`.

A type is known by its name, so nothing is imported for it; IPython's own registry by name would do,
if matplotlib's back end did not clear figures out of every formatter. What a formatter cannot read
it leaves out, and says so in the log: the value's other forms are shown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode

from .figures import figure_chart
from .frames import frame_data

log = logging.getLogger("vmcell.interpreter.kernel")

FIGURES = ("matplotlib.figure.Figure",)
# pandas 3 shows its types under the package's own name
FRAMES = ("pandas.core.frame.DataFrame", "pandas.DataFrame")
MAX_JSON_CHARACTERS = 8 << 20


class ChartFormatter(BaseFormatter):
    """Figures as charts."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, value: Any) -> object:
        return _form(value, FIGURES, figure_chart)


class DataFormatter(BaseFormatter):
    """DataFrames as columns."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict

    def __call__(self, value: Any) -> object:
        return _form(value, FRAMES, frame_data)


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython when the kernel starts."""
    formatters = shell.display_formatter.formatters
    for formatter in (ChartFormatter(parent=shell), DataFormatter(parent=shell)):
        formatters[formatter.format_type] = formatter
    for kind in (dict, list):
        formatters["application/json"].for_type(kind, json_value)


def json_value(value: object) -> object:
    """A dict or list as JSON, when JSON has all of it; None otherwise."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return json.loads(text) if len(text) <= MAX_JSON_CHARACTERS else None


def _form(value: Any, names: tuple[str, ...], form: Callable[[Any], object]) -> object:
    """`form` of a value whose class, or one that it is made from, has one of `names`."""
    if not any(f"{kind.__module__}.{kind.__name__}" in names for kind in type(value).__mro__):
        return None
    try:
        return form(value)
    # libraries change what their artists look like, and a picture must not fail for want of a chart
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        log.exception("no %s of a %s", form.__name__, type(value).__name__)
        return None
