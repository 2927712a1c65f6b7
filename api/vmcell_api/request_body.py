"""The JSON body of a request under Falcon."""

from __future__ import annotations

import falcon

from vmcell_api.json_body import read_json


def read_body(req: falcon.Request) -> dict[str, object]:
    """The request's JSON; JavaScript SDKs send it chunked, without a length. Raises CallerError."""
    if req.content_length is None and not req.env.get("wsgi.input_terminated"):
        return {}
    stream = req.bounded_stream if req.content_length is not None else req.stream
    return read_json(stream, req.content_length)
