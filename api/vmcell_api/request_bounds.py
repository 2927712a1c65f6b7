"""What no request may hold, whatever its route: checked before anything looks at it.

Databases, labels and environments take neither NUL nor text that is not Unicode, so paths and
queries with such things end here, with E2B's error body. Bodies have their bounds in `json_body`.
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import falcon

from vmcell_protos.errors import CallerError

MAX_QUERY_FIELDS = 200


class RequestBounds:
    """Falcon middleware: refuses with 400."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Checks path and query."""
        check_text("the path", req.env.get("RAW_URI", req.path).partition("?")[0])
        check_text("the query", req.query_string)
        if req.query_string.count("&") >= MAX_QUERY_FIELDS:
            raise CallerError(f"the query has more than {MAX_QUERY_FIELDS} fields")


def check_text(name: str, quoted: str) -> None:
    """Raises CallerError unless the percent-encoded text is Unicode without NUL."""
    data = unquote_to_bytes(quoted)
    if b"\0" in data:
        raise CallerError(f"{name} holds a NUL character; leave it out")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise CallerError(f"{name} is not UTF-8 once it is decoded") from error
