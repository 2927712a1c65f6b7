"""Files with holes: copied, digested, packed and unpacked."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_shim import sparse
from vmcell_shim.sparse import PIECE_BYTES, content_digest, copy_sparse, pack, unpack, write_all

BLOCK = 4096
# (offset, bytes) of writes into a file of that length; what is never written is a hole.
Writes = list[tuple[int, bytes]]
LENGTHS = st.one_of(
    st.integers(0, 6 * PIECE_BYTES),
    st.integers(0, 6).map(lambda pieces: pieces * PIECE_BYTES),
    st.integers(1, 6).map(lambda pieces: pieces * PIECE_BYTES - 1),
)
CONTENT = st.one_of(
    st.binary(min_size=1, max_size=20),
    st.sampled_from([bytes(BLOCK), bytes(PIECE_BYTES), b"\x01" * PIECE_BYTES, b"x" * BLOCK]),
)


@st.composite
def files(draw: st.DrawFn) -> tuple[int, Writes]:
    length = draw(LENGTHS)
    offsets = st.one_of(
        st.integers(0, length), st.integers(0, length // BLOCK).map(lambda row: row * BLOCK)
    )
    writes = draw(st.lists(st.tuples(offsets, CONTENT), max_size=6))
    return length, [(offset, data[: length - offset]) for offset, data in writes]


@contextmanager
def open_file(length: int = 0, writes: Writes = ()) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        os.ftruncate(fd, length)
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
        file.flush()
        file.seek(0)
        yield fd


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def packed(fd: int) -> bytes:
    with open_file() as writer:
        pack(fd, writer)
        return content(writer)


def unpacked(data: bytes, length: int, use: Callable[[int], bytes] = content) -> bytes:
    """What `use` says of the file that comes out."""
    with open_file(len(data), [(0, data)]) as reader, open_file() as writer:
        unpack(reader, writer, length)
        return use(writer)


@given(files())
def test_a_copy_has_the_same_bytes_and_no_more_blocks(file: tuple[int, Writes]) -> None:
    with open_file(*file) as reader, open_file() as writer:
        copy_sparse(reader, writer)
        assert content(writer) == content(reader)
        assert os.fstat(writer).st_blocks <= os.fstat(reader).st_blocks


@given(files())
def test_a_digest_is_of_the_content_alone(file: tuple[int, Writes]) -> None:
    with open_file(*file) as fd:
        dense = content(fd)
        with open_file(len(dense), [(0, dense)]) as other:
            assert content_digest(other) == content_digest(fd)


@given(files(), st.data())
def test_another_content_has_another_digest(file: tuple[int, Writes], data: st.DataObject) -> None:
    with open_file(*file) as fd:
        before, length = content_digest(fd), file[0]
        if length and data.draw(st.booleans()):
            offset = data.draw(st.integers(0, length - 1))
            (byte,) = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([byte ^ 1 << data.draw(st.integers(0, 7))]), offset)
        else:
            longer = data.draw(st.integers(0, 7 * PIECE_BYTES).filter(lambda n: n != length))
            before_content = content(fd)
            os.ftruncate(fd, longer)
            assert content(fd) != before_content
        assert content_digest(fd) != before


@given(files())
def test_what_is_packed_is_unpacked(file: tuple[int, Writes]) -> None:
    with open_file(*file) as fd:
        data = packed(fd)
        assert unpacked(data, file[0]) == content(fd)
        # Zeros and holes are not in it.
        full = sum(map(any, pieces(content(fd))))
        assert len(data) <= 24 + 12 + full * (PIECE_BYTES + 12)


def pieces(data: bytes) -> list[bytes]:
    return [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]


@given(files(), st.data())
@settings(max_examples=400)
def test_damage_is_refused_or_is_another_file(
    file: tuple[int, Writes], data: st.DataObject
) -> None:
    """Whatever is accepted is what `pack` writes of what comes out: there is no second form."""
    with open_file(*file) as fd:
        good = packed(fd)
    bad = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "extend", "head", "record"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del bad[at:]
    elif kind == "insert":
        bad[at:at] = data.draw(st.binary(min_size=1, max_size=30))
    elif kind == "extend":
        bad += data.draw(st.binary(min_size=1, max_size=30))
    elif kind == "head":
        bad[data.draw(st.integers(0, 35)) :] = data.draw(st.binary(max_size=40))
    else:
        bad[-12:] = data.draw(st.binary(min_size=12, max_size=12))
    refusals: list[CallerError] = []
    try:
        assert unpacked(bytes(bad), file[0], packed) == bad
    except CallerError as error:
        refusals.append(error)
    assert [error.code for error in refusals] in ([], ["data_loss"])


HEAD = sparse.MAGIC + (3 * PIECE_BYTES).to_bytes(8, "little")
PIECE = b"x" * PIECE_BYTES
END = sparse._RECORD.pack(3 * PIECE_BYTES, 0)


def record(offset: int, data: bytes) -> bytes:
    return sparse._RECORD.pack(offset, len(data)) + data


MALFORMED = {
    "empty": b"",
    "no head": END,
    "another magic": HEAD.replace(b"1", b"2") + END,
    "another length": HEAD[:-1] + b"\x01" + END,
    "no end": HEAD,
    "half a record": HEAD + END[:5],
    "an end too early": HEAD + sparse._RECORD.pack(0, 0),
    "an end too late": HEAD + sparse._RECORD.pack(4 * PIECE_BYTES, 0),
    "more behind the end": HEAD + END + b"\0",
    "a piece twice": HEAD + 2 * record(0, PIECE) + END,
    "pieces in the wrong order": HEAD + record(PIECE_BYTES, PIECE) + record(0, PIECE) + END,
    "an unaligned piece": HEAD + record(1, PIECE) + END,
    "a short piece": HEAD + record(0, PIECE[1:]) + END,
    "a long piece": HEAD + record(0, PIECE + PIECE) + END,
    "a piece beyond the end": HEAD + record(3 * PIECE_BYTES, PIECE) + END,
    "a piece far beyond": HEAD + sparse._RECORD.pack((1 << 64) - PIECE_BYTES, PIECE_BYTES) + END,
    "a huge piece": HEAD + sparse._RECORD.pack(0, (1 << 32) - 1) + END,
    "a piece of zeros": HEAD + record(0, bytes(PIECE_BYTES)) + END,
    "a piece that ends": HEAD + record(0, PIECE)[:-1],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    with pytest.raises(CallerError, match="a packed file is damaged") as caught:
        unpacked(MALFORMED[name], 3 * PIECE_BYTES)
    assert caught.value.code == "data_loss"


def test_a_length_that_no_file_has() -> None:
    with pytest.raises(OSError):
        unpacked(sparse.MAGIC + ((1 << 63) - 1).to_bytes(8, "little") + END, (1 << 63) - 1)


def short(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The kernel takes no more than 1000 bytes at a time."""
    original = getattr(os, name)
    monkeypatch.setattr(sparse.os, name, lambda fd, data, *at: original(fd, data[:1000], *at))


@pytest.mark.parametrize("names", [("write",), ("pwrite",), ("write", "pwrite")])
def test_short_writes(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    writes = [(3, b"a" * 5000), (2 * PIECE_BYTES, PIECE)]
    with open_file(3 * PIECE_BYTES + 7, writes) as fd, open_file() as copy:
        before = content(fd)
        for name in names:
            short(monkeypatch, name)
        copy_sparse(fd, copy)
        assert content(copy) == before
        assert unpacked(packed(fd), len(before)) == before


def test_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_file(3 * PIECE_BYTES, [(0, PIECE)]) as fd:
        data, before, read = packed(fd), content(fd), os.read
        monkeypatch.setattr(sparse.os, "read", lambda fd, count: read(fd, min(count, 1000)))
        assert unpacked(data, len(before)) == before


@pytest.mark.parametrize("act", [copy_sparse, pack])
def test_a_full_disk_is_an_error(act: Callable[[int, int], None]) -> None:
    """/dev/full has no room for a byte."""
    with open_file(PIECE_BYTES, [(0, PIECE)]) as fd:
        writer = os.open("/dev/full", os.O_WRONLY)
        try:
            with pytest.raises(OSError) as caught:
                act(fd, writer)
            assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)
        finally:
            os.close(writer)


def test_write_all_says_when_there_is_no_room() -> None:
    writer = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as caught:
            write_all(writer, b"x")
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(writer)


def test_a_file_that_shrinks_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_file(PIECE_BYTES, [(0, PIECE)]) as fd, open_file() as writer:
        monkeypatch.setattr(sparse.os, "pread", lambda *_: b"")
        with pytest.raises(OSError, match="became shorter"):
            copy_sparse(fd, writer)


def test_an_error_of_the_clone_that_says_nothing_of_cloning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(sparse.fcntl, "ioctl", broken)
    with open_file(1) as fd, open_file() as writer, pytest.raises(OSError, match="broken disk"):
        copy_sparse(fd, writer)


_COPY_IN_A_THREAD = """
import os, sys, threading
sys.path[:0] = {path!r}
from vmcell_shim.sparse import copy_sparse

def private_dirty_kib():
    with open("/proc/self/smaps_rollup") as rows:
        return next(int(row.split()[1]) for row in rows if row.startswith("Private_Dirty"))

reader, writer = (os.open(name, os.O_RDWR) for name in sys.argv[1:])
before = private_dirty_kib()
copying = threading.Thread(target=copy_sparse, args=(reader, writer))
copying.start()
copying.join()
print(private_dirty_kib() - before)
"""


def test_a_thread_that_has_copied_leaves_little_memory_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * (8 << 20))
    target.touch()
    program = _COPY_IN_A_THREAD.format(path=sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program, source, target], capture_output=True, check=True, text=True
    )
    assert target.read_bytes() == source.read_bytes()
    assert int(done.stdout) < 512
