"""Paths whose segments hold encoded slashes: `/templates/team%2Fname%3Adefault`.

WSGI hands paths over decoded, so such a segment falls apart. For the paths below, routing gets the
path as the client sent it (RAW_URI, which gunicorn sets), and `segment` decodes one parameter.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import falcon

PREFIXES = ("/templates/", "/v2/templates/")


class EncodedPaths:
    """Falcon middleware; stands before every other that looks at the path."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Puts the path back as it was sent, where a server tells it."""
        raw = req.env.get("RAW_URI", "")
        path = raw.partition("?")[0] if raw.startswith("/") else urlsplit(raw).path
        if path.startswith(PREFIXES) and unquote(path).rstrip("/") == req.path.rstrip("/"):
            req.path = path.rstrip("/")


def segment(text: str) -> str:
    """A parameter of such a path, decoded."""
    return unquote(text)
