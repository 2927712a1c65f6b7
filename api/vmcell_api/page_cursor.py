"""The `nextToken` of lists that are told newest first: where the next page begins."""

from __future__ import annotations

import base64
import binascii
import re

from vmcell_protos.errors import CallerError

_CURSOR = re.compile(r"(\d{1,15})__([a-z0-9-]+)")


def encode_cursor(at_unix_ms: int, row_id: str) -> str:
    """The token that continues after the row of this time and id."""
    return base64.urlsafe_b64encode(f"{at_unix_ms}__{row_id}".encode()).decode()


def decode_cursor(token: str, row_id: re.Pattern[str]) -> tuple[int, str]:
    """(time, id) of what `encode_cursor` wrote; CallerError, also where `row_id` is not the id's
    form."""
    try:
        text = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError) as error:
        raise _not_ours() from error
    match = _CURSOR.fullmatch(text)
    if match is None or not row_id.fullmatch(match[2]):
        raise _not_ours()
    return int(match[1]), match[2]


def _not_ours() -> CallerError:
    return CallerError("nextToken is none of this server's; start again without it")
