"""Names that cross the borders of the service: sandbox ids, API keys, tokens.

A sandbox id is 20 of a-z0-9 and begins with "i", as E2B's do; it holds no dash, because host
names of the data plane are cut at dashes. API keys are "e2b_" and lower-case hex: SDKs 2.25 to
2.45 check that form on their side. Keys are stored as SHA-256: they are 160 random bits, so a slow
hash would protect nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string

SANDBOX_ID = re.compile(r"[a-z0-9]{20}")
API_KEY = re.compile(r"e2b_[0-9a-f]{40}")
_ALPHABET = string.ascii_lowercase + string.digits


def new_sandbox_id() -> str:
    """A fresh id of 98 random bits."""
    return "i" + "".join(secrets.choice(_ALPHABET) for _ in range(19))


def new_api_key() -> str:
    """A fresh key; only its hash is ever stored."""
    return "e2b_" + secrets.token_hex(20)


def new_access_token() -> str:
    """A fresh envd token of 256 random bits."""
    return secrets.token_hex(32)


def hash_api_key(key: str) -> str:
    """What the store keeps of a key, as hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def sandbox_id_of(text: str) -> str | None:
    """The sandbox id in `text`, None when it is none.

    SDKs 1.0 to 1.5 send `<sandbox id>-<client id>`; the second part is dropped.
    """
    candidate = text.partition("-")[0]
    return candidate if SANDBOX_ID.fullmatch(candidate) else None
