"""manifest.json, the records of digests, packed files and EROFS superblocks.

Faces files, which anybody may have written. A manifest is one document to the byte; a packed file
is what pack() writes of the file that comes out of it; a record that is none counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re

from json_input import expand
from supply import Supply

from vmcell_protos.errors import CallerError
from vmcell_shim import digests, erofs_superblock, sparse
from vmcell_shim.snapshot_manifest import (
    DISK,
    MEMORY,
    STATE,
    Manifest,
    SavedFile,
    parse,
    render,
)

ALLOWED: tuple[type[Exception], ...] = (CallerError,)
REACHES = (
    "vmcell_shim.snapshot_manifest:render",
    "vmcell_shim.sparse:pack",
    "vmcell_shim.digests:Digests._known",
    "vmcell_shim.erofs_superblock:parse_superblock",
)
MANIFEST, PACKED, RECORD, SUPERBLOCK = range(4)
PACKED_BYTES = 3 * sparse.PIECE_BYTES + 100
_DIGEST = re.compile(rb'"digest": "blake2b:[0-9a-f]{64}"\n\}\n$')


def one(data: bytes) -> None:
    supply = Supply(data)
    mode = supply.byte() % 4
    rest = supply.rest()
    if mode == MANIFEST:
        document = _signed(expand(rest))
        assert render(parse(document, "s")) == document
    elif mode == PACKED:
        _unpack(_filled(rest))
    elif mode == RECORD:
        _know(expand(rest))
    else:
        found = erofs_superblock.parse_superblock(rest.ljust(4096, b"\0"))
        assert found is None or (found.block_bytes >= 512 and found.length_bytes >= 0)


def _signed(document: bytes) -> bytes:
    """The document with the digest that its own content has, if it is JSON: else no change to it
    would ever get beyond the digest."""
    try:
        tree = json.loads(document)
        del tree["digest"]
        digest = hashlib.blake2b(json.dumps(tree).encode(), digest_size=32).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError):
        return document
    return _DIGEST.sub(b'"digest": "blake2b:%b"\n}\n' % digest.encode(), document)


def _filled(data: bytes) -> bytes:
    """`Z` and two bytes stand for a whole piece of that byte, so that inputs stay small."""
    return data.replace(b"FULL", b"F" * sparse.PIECE_BYTES).replace(b"TAIL", b"T" * 100)


def _unpack(packed: bytes) -> None:
    reader, writer, again = (os.memfd_create("file") for _ in range(3))
    try:
        os.write(reader, packed)
        os.lseek(reader, 0, os.SEEK_SET)
        sparse.unpack(reader, writer, PACKED_BYTES)
        assert os.fstat(writer).st_size == PACKED_BYTES
        sparse.pack(writer, again)
        assert os.pread(again, len(packed) + 1, 0) == packed
    finally:
        for fd in (reader, writer, again):
            os.close(fd)


def _know(record: bytes) -> None:
    """A record in the place where Digests looks for one: /proc/self/fd/<number>."""
    fd = os.memfd_create("record")
    try:
        os.write(fd, record)
        found = digests.Digests("/proc/self/fd")._known(str(fd))
        if found is None:
            raise CallerError("it is no record")
        identity, digest = found
        assert isinstance(digest, str)
        assert identity is not None
        assert identity != [1, 2, 3] or json.loads(record)
    finally:
        os.close(fd)


def _manifest(*, disk: bool) -> Manifest:
    files = {
        STATE: SavedFile(bytes=100, allocated_bytes=4096, digest="blake2b:01"),
        MEMORY: SavedFile(bytes=512 << 20, allocated_bytes=8192, digest="blake2b:02"),
    }
    if disk:
        files[DISK] = SavedFile(bytes=64 << 20, allocated_bytes=4096, digest="blake2b:03")
    return Manifest(
        created_unix_ns=1_700_000_000_000_000_000,
        container_id="c1",
        vcpus=2,
        memory_mib=512,
        kernel="blake2b:aa",
        base_image="blake2b:bb",
        images=("blake2b:cc",),
        disk=disk,
        macs=("02:00:00:00:00:01",),
        terminal=False,
        parent="before",
        files=files,
    )


def _packed() -> bytes:
    reader, writer = os.memfd_create("file"), os.memfd_create("packed")
    try:
        os.truncate(reader, PACKED_BYTES)
        os.pwrite(reader, b"F" * sparse.PIECE_BYTES, sparse.PIECE_BYTES)
        os.pwrite(reader, b"T" * 100, 3 * sparse.PIECE_BYTES)
        sparse.pack(reader, writer)
        packed = os.pread(writer, PACKED_BYTES, 0)
    finally:
        os.close(reader)
        os.close(writer)
    return packed.replace(b"F" * sparse.PIECE_BYTES, b"FULL").replace(b"T" * 100, b"TAIL")


def seeds() -> dict[str, bytes]:
    head = bytearray(4096)
    head[1024:1028] = (0xE0F5E1E2).to_bytes(4, "little")
    head[1024 + 12] = 12
    return {
        "manifest": b"\0" + render(_manifest(disk=True)),
        "manifest-without-disk": b"\0" + render(_manifest(disk=False)),
        "packed": b"\x01" + _packed(),
        "record": b'\x02[[1, 2, 3], "blake2b:00"]',
        "superblock": b"\x03" + bytes(head[:1120]),
    }
