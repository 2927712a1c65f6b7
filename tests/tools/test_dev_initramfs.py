"""The newc archive: any entries come back as they went in, read by a reader of its own."""

from __future__ import annotations

import stat

from hypothesis import given
from hypothesis import strategies as st

from vmcell_tools.dev_initramfs import TRAILER, archive, directory, file, symlink

NAMES = st.text("abcdefgh", min_size=1, max_size=5)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


def read(data: bytes) -> list[tuple[str, int, bytes]]:
    """(path, mode, content) of each record, as the kernel's init/initramfs.c walks them."""
    records, at = [], 0
    while True:
        assert at % 4 == 0
        header = data[at : at + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = at + (110 + name_size + 3) // 4 * 4
        at = start + (size + 3) // 4 * 4
        path = name[:-1].decode()
        if path == TRAILER:
            assert at == len(data)
            return records
        records.append((path, mode, data[start : start + size]))


@given(st.dictionaries(PATHS, st.binary(max_size=20)))
def test_files_come_back_after_their_directories(contents: dict[str, bytes]) -> None:
    # A name that is also a directory of another cannot be in one tree.
    files = {
        path: content
        for path, content in contents.items()
        if not any(other.startswith(f"{path}/") for other in contents)
    }
    records = read(archive(file(path, content) for path, content in files.items()))
    seen: set[str] = set()
    for path, mode, content in records:
        parent = path.rpartition("/")[0]
        assert not parent or parent in seen
        assert path not in seen
        seen.add(path)
        if stat.S_ISREG(mode):
            assert content == files[path]
        else:
            assert stat.S_ISDIR(mode)
    assert {path for path, mode, _ in records if stat.S_ISREG(mode)} == set(files)


def test_modes_links_and_repeated_directories() -> None:
    data = archive(
        [
            directory("bin"),
            file("bin/tool", b"x", mode=0o755),
            symlink("bin/sh", "tool"),
            directory("bin"),
        ]
    )
    assert read(data) == [
        ("bin", stat.S_IFDIR | 0o755, b""),
        ("bin/tool", stat.S_IFREG | 0o755, b"x"),
        ("bin/sh", stat.S_IFLNK | 0o777, b"tool"),
    ]
