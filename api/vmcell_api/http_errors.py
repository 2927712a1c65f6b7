"""Every error of the API as E2B's body: `{"code": <status>, "message": <sentence>}`.

SDKs retry 429, 502, 503 and 504 unless `Should-Retry: false` stands in the answer; it does wherever
asking again cannot help, so that one failing create does not become four.
"""

from __future__ import annotations

import json
import logging

import falcon
from gunicorn.http.errors import ParseException

from vmcell_api.coded_errors import CodedError
from vmcell_api.json_body import BodyTooLarge
from vmcell_api.node_channel import NodeUnreachable
from vmcell_api.request_rate import RateExceeded
from vmcell_protos.errors import CODES, VmcellError

log = logging.getLogger("vmcell.api")

HTTP_CODES = {404: "not_found", 405: "unimplemented", 413: "resource_exhausted"}


def write_error(
    resp: falcon.Response, status: int, message: str, *, error_code: str = "", retry: bool = False
) -> None:
    """Puts the error into the answer."""
    resp.status = status
    resp.content_type = falcon.MEDIA_JSON
    resp.data = json.dumps(error_body(status, message, error_code)).encode()
    if retry:
        resp.set_header("Should-Retry", "true")
        resp.set_header("Retry-After", "1")
    elif status >= 500 or status == 429:
        resp.set_header("Should-Retry", "false")


def error_body(status: int, message: str, error_code: str = "") -> dict[str, object]:
    """E2B's error object."""
    body: dict[str, object] = {"code": status, "message": message}
    if error_code:
        body["error_code"] = error_code
    return body


def status_of(error: VmcellError) -> int:
    """The HTTP status of one of our errors."""
    named = error.status if isinstance(error, CodedError) else None
    return named or CODES[error.code].http


def on_vmcell_error(
    req: falcon.Request, resp: falcon.Response, error: VmcellError, params: object
) -> None:
    """One of ours: the code's row in the table says the status."""
    status = CODES[error.code].http
    req.context.error_code = error.code
    if isinstance(error, RateExceeded):
        req.context.rate_exceeded = True
        write_error(resp, 429, str(error), retry=True)
        resp.set_header("Retry-After", str(error.retry_after_s))
    elif isinstance(error, BodyTooLarge):
        write_error(resp, 413, str(error))
    elif isinstance(error, NodeUnreachable):
        log.error("%s", error)
        write_error(resp, status, str(error), retry=True)
    elif isinstance(error, CodedError):
        status = error.status or status
        if status >= 500:
            log.error("%s %s: %s", req.method, req.path, error)
        write_error(resp, status, str(error), error_code=error.error_code, retry=error.retry)
    else:
        if status >= 500:
            log.error("%s %s: %s", req.method, req.uri_template or "no route", error)
        write_error(resp, status, str(error))


def on_http_error(
    req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: object
) -> None:
    """One of Falcon's: no such route, no such method, a header it cannot read."""
    words = {404: f"no route {req.path[:100]}", 405: f"{req.method} is not allowed here"}
    message = words.get(error.status_code) or error.description or error.title or "refused"
    req.context.error_code = HTTP_CODES.get(error.status_code, "invalid_argument")
    write_error(resp, error.status_code, message)
    if error.headers:
        resp.set_headers(error.headers)


def on_broken_body(
    req: falcon.Request, resp: falcon.Response, error: ParseException, params: object
) -> None:
    """gunicorn found out while the body was read: its words may quote it, and are left out."""
    req.context.error_code = "invalid_argument"
    write_error(resp, 400, "the body is badly chunked or cut short; send it again")


def on_bug(req: falcon.Request, resp: falcon.Response, error: Exception, params: object) -> None:
    """Anything else is a bug: the trace goes to the log, not to the client."""
    req.context.error_code = "internal"
    log.error("%s %s failed", req.method, req.uri_template or "no route", exc_info=error)
    words = "the server failed; its log has the trace"
    write_error(resp, 500, words, error_code="internal_server_error")


def install(app: falcon.App) -> None:
    """Makes every error of `app` leave in this form."""
    app.add_error_handler(Exception, on_bug)
    app.add_error_handler(ParseException, on_broken_body)
    app.add_error_handler(falcon.HTTPError, on_http_error)
    app.add_error_handler(VmcellError, on_vmcell_error)
