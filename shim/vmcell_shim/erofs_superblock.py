"""The superblock of an EROFS image: what it needs of a kernel, and how long it is.

Source: Linux fs/erofs/erofs_fs.h, struct erofs_super_block, 1024 bytes into the image.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEAD_BYTES = 4096
_OFFSET = 1024
_MAGIC = 0xE0F5E1E2
# magic, -, -, blkszbits, -, -, -, -, -, blocks, -, -, -, -, feature_incompat
_FIELDS = struct.Struct("<IIIBBHQQIIII16s16sI")
_PAGE_BITS, _MAX_BLOCK_BITS = 12, 16
# CHUNKED_FILE and XATTR_PREFIXES. The others mean compression, extra devices, or a newer kernel
# than the guest's.
_PLAIN_FEATURES = 0x4 | 0x40


@dataclass(frozen=True, kw_only=True)
class Superblock:
    """`length_bytes` is what the file system uses; the file may be longer.

    `plain`: the guest's kernel mounts it as it is, with DAX (blocks of a page, no compression, one
    device).
    """

    block_bytes: int
    length_bytes: int
    plain: bool


def parse_superblock(head: bytes) -> Superblock | None:
    """The superblock in the first HEAD_BYTES of an image; None for another kind of file."""
    if len(head) < _OFFSET + _FIELDS.size:
        return None
    values = _FIELDS.unpack_from(head, _OFFSET)
    magic, block_bits, blocks, features = values[0], values[3], values[9], values[14]
    if magic != _MAGIC or not 9 <= block_bits <= _MAX_BLOCK_BITS:
        return None
    return Superblock(
        block_bytes=1 << block_bits,
        length_bytes=blocks << block_bits,
        plain=block_bits == _PAGE_BITS and not features & ~_PLAIN_FEATURES,
    )
