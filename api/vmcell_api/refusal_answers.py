"""What a client is answered when its data-plane request goes nowhere: JSON, or a page in a browser.

SDKs look for sentences in the JSON ("was not found", "port is not open"), a person sees a page only
when the browser says that it navigates.
"""

from __future__ import annotations

import html
import json

import falcon

from vmcell_api.data_route import Refusal

_PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{status}</title>
<body style="font-family: sans-serif; margin: 4em auto; max-width: 40em">
<h1>{status}</h1><p>{message}</p>{details}</body></html>
"""


def write_refusal(req: falcon.Request, resp: falcon.Response, refusal: Refusal) -> None:
    """Puts the refusal into the answer."""
    resp.status = refusal.status
    resp.set_header("Access-Control-Allow-Origin", "*")
    if refusal.status == 503:
        resp.set_header("Retry-After", "1")
    elif refusal.status >= 500:
        resp.set_header("Should-Retry", "false")
    if _navigates(req):
        resp.content_type = falcon.MEDIA_HTML
        resp.data = _page(refusal).encode()
    else:
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _body(refusal).encode()


def allow_preflight(req: falcon.Request, resp: falcon.Response) -> None:
    """A browser asks before it sends the headers that would name the sandbox or open its port."""
    resp.status = 204
    resp.set_header("Access-Control-Allow-Origin", "*")
    resp.set_header("Access-Control-Allow-Methods", "HEAD, GET, POST, PUT, PATCH, DELETE")
    resp.set_header(
        "Access-Control-Allow-Headers", req.get_header("Access-Control-Request-Headers") or "*"
    )
    resp.set_header("Access-Control-Max-Age", "7200")


def _body(refusal: Refusal) -> str:
    body: dict[str, object] = {"message": refusal.message, "code": refusal.status}
    if refusal.sandbox_id:
        body["sandboxId"] = refusal.sandbox_id
    if refusal.port:
        body["port"] = refusal.port
    return json.dumps(body)


def _page(refusal: Refusal) -> str:
    details = [("sandbox", refusal.sandbox_id), ("port", str(refusal.port or ""))]
    lines = "".join(f"<p>{name}: {html.escape(value)}</p>" for name, value in details if value)
    message = html.escape(refusal.message)
    return _PAGE.format(status=refusal.status, message=message, details=lines)


def _navigates(req: falcon.Request) -> bool:
    """Browsers say so (Fetch Metadata); scripts in pages, SDKs and curl do not."""
    wants_page = "text/html" in (req.get_header("Accept") or "")
    return wants_page and req.get_header("Sec-Fetch-Mode") == "navigate"
