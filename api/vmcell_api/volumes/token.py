"""Volume tokens: whoever has one may read and write the files of that volume, for its whole life.

A token is HMAC-SHA256 of the volume's id under a key that is in one file of this host, so that the
server of the files needs no store and `GET /volumes/{id}` can answer the same token again. It ends
with the volume; a new key ends all tokens at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets

from vmcell_protos.errors import HostError

KEY_BYTES = 32
PREFIX = "vol_"


class VolumeTokens:
    """Mints and checks tokens with one key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise HostError(f"a volume token key has {KEY_BYTES} bytes, this one {len(key)}")
        self._key = key

    def mint(self, volume_id: str) -> str:
        """The token of a volume."""
        return PREFIX + hmac.new(self._key, volume_id.encode(), hashlib.sha256).hexdigest()

    def admits(self, token: str, volume_id: str) -> bool:
        """Whether `token` is that volume's."""
        given = token.encode("utf-8", "surrogatepass")
        return hmac.compare_digest(given, self.mint(volume_id).encode())


def load_tokens(path: str) -> VolumeTokens:
    """The tokens of the key in `path`, which is made if it is missing; raises HostError.

    Processes that start at once agree on one key: it appears whole, and only once.
    """
    try:
        if not os.path.exists(path):
            _make_key(path)
        with open(path, "rb") as file:
            return VolumeTokens(file.read(KEY_BYTES + 1))
    except OSError as error:
        raise HostError(f"cannot read the volume token key {path}: {error}") from error


def _make_key(path: str) -> None:
    draft = f"{path}.{secrets.token_hex(8)}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
