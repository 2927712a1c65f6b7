"""A machine's size, and how it travels."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_runtime.config import FsConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_runtime.memory import HUGE_PAGE_BYTES
from vmcell_runtime.size import Size, size_from_words, size_of, size_words

SIZES = st.builds(
    Size,
    vcpu_count=st.integers(1, 8),
    memory_mib=st.integers(64, 262_144),
    shared_memory=st.booleans(),
    fixed_windows=st.integers(1, 64),
    spare_windows=st.integers(0, 24),
    pmem_bytes=st.lists(st.integers(1, 1 << 20).map(lambda n: n * HUGE_PAGE_BYTES), max_size=8).map(
        tuple
    ),
)


@given(SIZES)
def test_a_size_arrives_as_it_was_sent(size: Size) -> None:
    assert size_from_words(size_words(size)) == size


@given(st.lists(st.binary(max_size=24), max_size=16))
def test_any_words_are_a_size_or_an_error(words: list[bytes]) -> None:
    try:
        size = size_from_words(words)
    except CallerError:
        return
    assert size_from_words(size_words(size)) == size


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (b"", "is not the size"),
        (b"1 512 0 9", "is not the size"),
        (b"1 512 0 9 0 -2097152", "is not the size"),
        (b"1 512 0 9 0 \xc2\xb2", "is not the size"),
        (b"1 512 0 9 0" + b" 2097152" * 9, "is not the size"),
        (b"0 512 0 9 0", "vcpu_count of a machine's size is 0"),
        (b"9 512 0 9 0", "vcpu_count"),
        (b"1 63 0 9 0", "memory_mib"),
        (b"1 512 2 9 0", "shared_memory"),
        (b"1 512 0 0 0", "fixed_windows"),
        (b"1 512 0 9 25", "spare_windows"),
        (b"1 512 0 9 0 0", "pmem_bytes"),
        (b"1 512 0 9 0 4096", "pmem_bytes"),
        (b"1 512 0 9 0 2097153", "multiples of 2 MiB"),
        (b"1 512 0 9 0 35184372088832", "pmem_bytes"),
    ],
)
def test_what_is_no_size_is_refused(words: bytes, what: str) -> None:
    with pytest.raises(CallerError, match=what):
        size_from_words(words.split())


def test_it_is_that_of_the_machine_with_its_files() -> None:
    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
        first.truncate(HUGE_PAGE_BYTES)
        second.truncate(HUGE_PAGE_BYTES + 1)
        config = MachineConfig(
            vcpu_count=2,
            memory_mib=128,
            kernel_descriptor=0,
            pmem=(PmemConfig(descriptor=2), PmemConfig(descriptor=1)),
            fs=(FsConfig(descriptor=3, tag="t"),),
            vsock=VsockConfig(guest_cid=3),
            spare_windows=4,
        )
        size = size_of(config, [0, first.fileno(), second.fileno(), 0])
    lengths = (2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    assert size == Size(2, 128, True, 5, 4, lengths)


def test_an_image_without_content_has_none() -> None:
    config = MachineConfig(
        vcpu_count=1, memory_mib=64, kernel_descriptor=0, pmem=(PmemConfig(descriptor=0),)
    )
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(CallerError, match="0 bytes"):
            size_of(config, [fd])
    finally:
        os.close(fd)
