"""Cross-origin rules (Fetch standard): any page may call envd, the access token is what guards."""

from __future__ import annotations

from collections.abc import Mapping

_METHODS = ("HEAD", "GET", "POST", "PUT", "PATCH", "DELETE")
_EXPOSED = (
    "Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Connect-Protocol-Version, "
    "Connect-Content-Encoding, Connect-Accept-Encoding, Location, Cache-Control, "
    "X-Content-Type-Options"
)
# Browsers cap it at two hours.
_MAX_AGE_SECONDS = 7200


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    return method == "OPTIONS" and "access-control-request-method" in headers


def preflight_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a browser asks before the real request; a method not allowed gets no permission."""
    vary = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
    method = headers["access-control-request-method"].strip().upper()
    if "origin" not in headers or method not in _METHODS:
        return [("Vary", vary)]
    answer = [
        ("Vary", vary),
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Allow-Methods", method),
        ("Access-Control-Max-Age", str(_MAX_AGE_SECONDS)),
    ]
    asked = headers.get("access-control-request-headers")
    if asked:
        answer.append(("Access-Control-Allow-Headers", asked))
    return answer


def response_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Added to every answer to a page."""
    if "origin" not in headers:
        return []
    return [
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Expose-Headers", _EXPOSED),
    ]
