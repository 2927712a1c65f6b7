"""Signed file URLs (E2B): `v1_` + base64 of the SHA-256 of path, operation, user, token, time."""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Mapping
from hmac import compare_digest

_VERSION = "v1_"

# OpenSSL reads its configuration at the first digest; that must not happen inside a container.
hashlib.sha256(b"").digest()


class SignatureError(ValueError):
    """The request is not signed as it must be; the text goes to the client with status 401."""


def same_secret(left: str, right: str) -> bool:
    """Compare in constant time; any text is allowed."""
    return compare_digest(
        left.encode("utf-8", "surrogatepass"), right.encode("utf-8", "surrogatepass")
    )


def sign(path: str, operation: str, user: str, token: str, expiration: str | None) -> str:
    """`operation` is "read" or "write", `user` empty when the URL names none."""
    text = f"{path}:{operation}:{user}:{token}"
    if expiration is not None:
        text += f":{expiration}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return _VERSION + binascii.b2a_base64(digest, newline=False).decode("ascii").rstrip("=")


def check_signature(query: Mapping[str, str], operation: str, token: str, now_s: float) -> None:
    """Raise SignatureError unless `query` is a URL signed with `token` that is still valid."""
    given = query.get("signature")
    if given is None:
        raise SignatureError("missing signature query parameter")
    expiration = query.get("signature_expiration")
    wanted = sign(query.get("path", ""), operation, query.get("username", ""), token, expiration)
    if not same_secret(given, wanted):
        raise SignatureError("invalid signature")
    if expiration is None:
        return
    # Its own maker signed it, so a text that is no number is a mistake, not an attack.
    if not (expiration.isascii() and expiration.isdigit()):
        raise SignatureError("invalid signature expiration")
    if int(expiration[:18]) < now_s:
        raise SignatureError("signature is already expired")
