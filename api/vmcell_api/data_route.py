"""Which sandbox and port a data-plane request is for; pure, so every rule has a test.

Sources: E2B's client proxy. Host `<port>-<id>[-<client id>].<domain>` comes first, the headers
`E2b-Sandbox-Id` and `-Port` second, the signature of a `/files` URL last: SDKs that were given one
URL for all sandboxes name the sandbox in it by nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from urllib.parse import parse_qsl, unquote

from vmcell_api.identifiers import SANDBOX_ID

ENVD_PORT = 49983
INTERNAL_PATHS = frozenset(
    {"init", "layer", "freeze", "unfreeze", "fsfreeze", "fsthaw", "collapse", "upgrade"}
)
_MAX_PORT_DIGITS = 5
# Dots and slashes a server may see in a path once it has decoded it.
_SEPARATORS = re.compile(r"[/\\]+")
_HOST = re.compile(r"(?P<port>[0-9]{1,5})-(?P<id>[a-z0-9]+)(-[a-z0-9]+)?\.(?P<domain>.+)")
# An answer of this module travels as a header, so clients' words must not be in it.
_REFUSAL_FIELDS = ("status", "message", "sandbox_id", "port")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What nginx passes on of a request; `uri` is the raw request target."""

    method: str
    host: str
    uri: str
    id_header: str = ""
    port_header: str = ""
    traffic_token: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The sandbox and the port in it that a request names."""

    sandbox_id: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A `/files` URL that names its sandbox by nothing but its signature."""

    path: str
    operation: str
    username: str
    expiration: str
    signature: str


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a request goes nowhere; `sandbox_id` and `port` when they are known."""

    status: int
    message: str
    sandbox_id: str = ""
    port: int = 0

    def as_header(self) -> str:
        """The refusal as printable ASCII for `refusal_from_header`."""
        return json.dumps(asdict(self), separators=(",", ":"))


def refusal_from_header(text: str) -> Refusal | None:
    """What `Refusal.as_header` wrote; None for anything else."""
    try:
        fields = json.loads(text)
        return Refusal(**{name: fields[name] for name in _REFUSAL_FIELDS})
    except (ValueError, TypeError, KeyError):
        return None


def find_target(request: Request, domain: str) -> Target | Signed | Refusal:
    """The sandbox and port that `request` names; raises nothing, whatever the client sent.

    `domain` is as clients are told it, perhaps with a port; "": host names of any domain do.
    """
    match = _HOST.fullmatch(_host_name(request.host))
    if match and _host_name(domain) in ("", match["domain"]):
        return _target(match["id"], match["port"], request.uri)
    if request.id_header and request.port_header:
        sandbox_id = request.id_header.lower().partition("-")[0]
        return _target(sandbox_id, request.port_header, request.uri)
    if request.id_header or request.port_header:
        missing = "E2b-Sandbox-Port" if request.id_header else "E2b-Sandbox-Id"
        return Refusal(status=400, message=f"the header {missing} is missing")
    return _signed(request)


def check_traffic_token(request: Request, target: Target, token: str) -> Refusal | None:
    """The refusal of a request to a port that `token` closes, None when it may pass.

    "": the sandbox's ports are open to everybody. envd has an access token of its own.
    """
    if not token or target.port == ENVD_PORT:
        return None
    given = request.traffic_token.encode("utf-8", "replace")
    if hmac.compare_digest(given, token.encode()):
        return None
    return Refusal(
        status=403,
        message="the traffic access token is missing or wrong; send trafficAccessToken of the "
        "sandbox in the header e2b-traffic-access-token",
        sandbox_id=target.sandbox_id,
        port=target.port,
    )


def token_signs(signed: Signed, token: str) -> bool:
    """Whether `token` made the signature (constant time in the signature)."""
    parts = [signed.path, signed.operation, signed.username, token]
    if signed.expiration:
        parts.append(signed.expiration)
    digest = hashlib.sha256(":".join(parts).encode("utf-8", "surrogatepass")).digest()
    expected = "v1_" + base64.b64encode(digest).decode().rstrip("=")
    return hmac.compare_digest(expected.encode(), signed.signature.encode("utf-8", "replace"))


def signing_token(signed: Signed, tokens: Mapping[str, str]) -> str | None:
    """The sandbox id whose token made the signature; all are tried, whatever the first says."""
    found = None
    for sandbox_id, token in tokens.items():
        if token_signs(signed, token):
            found = sandbox_id
    return found


def _host_name(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return (name if colon and port.isdigit() else host.lower()).removesuffix(".")


def _is_port(text: str) -> bool:
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_PORT_DIGITS
    return is_number and 0 < int(text) < 65536


def _target(sandbox_id: str, port_text: str, uri: str) -> Target | Refusal:
    if not SANDBOX_ID.fullmatch(sandbox_id):
        return Refusal(status=400, message="the sandbox id is not valid")
    if not _is_port(port_text):
        return Refusal(status=400, message="the port is not valid", sandbox_id=sandbox_id)
    port = int(port_text)
    if port == ENVD_PORT and _is_internal(uri):
        return Refusal(status=404, message="no such path", sandbox_id=sandbox_id, port=port)
    return Target(sandbox_id=sandbox_id, port=port)


def _is_internal(uri: str) -> bool:
    """Whether any reading of the path, decoded once or twice, begins with an internal one."""
    path = uri.partition("?")[0].partition("#")[0]
    if "://" in path:
        path = path.partition("://")[2].partition("/")[2]
    for _ in range(3):
        segments: list[str] = []
        for segment in _SEPARATORS.split(path):
            if segment == "..":
                segments = segments[:-1]
            elif segment not in ("", "."):
                segments.append(segment)
        if segments and segments[0].partition(";")[0].strip().lower() in INTERNAL_PATHS:
            return True
        path = unquote(path)
    return False


def _signed(request: Request) -> Signed | Refusal:
    path, _, query_string = request.uri.partition("?")
    query = dict(parse_qsl(query_string, keep_blank_values=True))
    if path != "/files" or "signature" not in query or request.method not in ("GET", "POST"):
        return Refusal(
            status=400,
            message="the request names no sandbox; send E2b-Sandbox-Id and E2b-Sandbox-Port, "
            "or use the host <port>-<sandbox id>.<domain>",
        )
    return Signed(
        path=query.get("path", ""),
        operation="read" if request.method == "GET" else "write",
        username=query.get("username", ""),
        expiration=query.get("signature_expiration", ""),
        signature=query["signature"],
    )
