"""Jupyter's MIME bundles as E2B's results. No I/O.

Source: Jupyter's messaging protocol, "display_data"; E2B's result fields.
"""

from __future__ import annotations

from collections.abc import Mapping

from .lines import Line

FIELDS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}


def result(bundle: Mapping[str, object], *, is_main: bool) -> Line:
    """A result line; `is_main`: the value of the cell's last expression.

    MIME types without a field of their own are in `extra`. The repr of a string loses its quotes.
    """
    line: dict[str, object] = {"type": "result", "is_main_result": is_main}
    extra: dict[str, object] = {}
    for mime_type, content in bundle.items():
        name = FIELDS.get(mime_type)
        if name is None:
            extra[mime_type] = content
        elif name in ("json", "data", "chart"):
            line[name] = content
        else:
            line[name] = _joined(content)
    text = line.get("text")
    if isinstance(text, str):
        line["text"] = without_quotes(text)
    if extra:
        line["extra"] = extra
    return line


def without_quotes(text: str) -> str:
    """`text` without one pair of equal quotes around it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _joined(content: object) -> object:
    """Old kernels send texts as lists of lines (nbformat's "multiline string")."""
    if isinstance(content, list) and all(isinstance(piece, str) for piece in content):
        return "".join(content)
    return content
