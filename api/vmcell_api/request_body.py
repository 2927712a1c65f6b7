"""The body of a request, whichever way the client sends it."""

from __future__ import annotations

import falcon

from vmcell_api.json_body import Readable, read_json


def json_of(req: falcon.Request) -> dict[str, object]:
    """The request's JSON object; {} without a body. Raises CallerError."""
    stream = stream_of(req)
    return {} if stream is None else read_json(stream, req.content_length)


def stream_of(req: falcon.Request) -> Readable | None:
    """The body, which ends by itself; None when there is none.

    JavaScript SDKs send bodies chunked, without a length.
    """
    if req.content_length is not None:
        return req.bounded_stream
    return req.stream if req.env.get("wsgi.input_terminated") else None
