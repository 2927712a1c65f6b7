"""Names, mount paths and content paths: what passes is safe, whatever the client writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.volumes.files import MAX_PATH_BYTES, parse_path
from vmcell_api.volumes.names import (
    MAX_MOUNTS,
    VOLUME_ID,
    check_mount_paths,
    check_volume_name,
    mount_path,
    new_volume_id,
)
from vmcell_api.volumes.token import VolumeTokens
from vmcell_protos.errors import CallerError

PIECES = st.sampled_from(["a", "data", "..", ".", "", "/", "proc", "etc", "x y", "\0", "\n", "é"])
PATHS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("/".join))


@given(PATHS)
def test_a_mount_path_that_passes_is_plain_and_nowhere_dangerous(text: str) -> None:
    try:
        path = mount_path(text)
    except CallerError:
        return
    parts = path.split("/")[1:]
    assert path.startswith("/")
    assert all(part not in ("", ".", "..") for part in parts)
    assert parts[0] not in ("proc", "sys", "dev")
    assert path not in ("/", "/etc")
    assert path.isprintable()
    assert mount_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "//", "data", "./data", "/a/../b", "/a/./b", "/..", "/a/..", "/proc", "/proc/1"),
        *("/sys", "//sys//fs", "/dev", "/dev/shm", "/etc", "/etc/", "/etc/hosts"),
        *("/etc/resolv.conf", "/a\0b", "/a\nb", "/" + "x" * 512),
    ],
)
def test_paths_where_nothing_may_be_mounted(path: str) -> None:
    with pytest.raises(CallerError, match="volumeMounts path"):
        mount_path(path)


def test_ordinary_paths_pass() -> None:
    assert mount_path("/mnt/data/") == "/mnt/data"
    assert mount_path("/processes") == "/processes"
    assert mount_path("//etc//ssl") == "/etc/ssl"


@given(
    st.lists(
        st.sampled_from(["/a", "/a/b", "/a b", "/a-b", "/a.b", "/ab", "/c", "/a!"]), max_size=8
    )
)
def test_mounts_of_one_sandbox_lie_apart(paths: list[str]) -> None:
    apart = all(
        first == second or not (second + "/").startswith(first + "/")
        for first in paths
        for second in paths
    ) and len(set(paths)) == len(paths)
    if apart:
        assert check_mount_paths(paths) == tuple(paths)
    else:
        with pytest.raises(CallerError, match="apart"):
            check_mount_paths(paths)


def test_a_sandbox_has_so_many_mounts() -> None:
    check_mount_paths([f"/v{number}" for number in range(MAX_MOUNTS)])
    with pytest.raises(CallerError, match="at most 16"):
        check_mount_paths([f"/v{number}" for number in range(MAX_MOUNTS + 1)])


@given(PATHS)
def test_a_content_path_that_passes_stays_below_the_root(text: str) -> None:
    try:
        parts = parse_path(text)
    except CallerError:
        return
    assert all(part not in (b"", b".", b"..") and b"/" not in part for part in parts)
    assert all(b"\0" not in part and len(part) <= 255 for part in parts)
    assert len(b"/".join(parts)) <= MAX_PATH_BYTES


@given(st.text(max_size=140))
def test_names(text: str) -> None:
    try:
        assert check_volume_name(text) == text
    except CallerError:
        return
    assert 0 < len(text) <= 128
    assert text.isascii()
    assert not set(text) & set("/. \0\n")


def test_ids_are_no_sandbox_ids_and_tokens_are_one_volumes() -> None:
    one, two = new_volume_id(), new_volume_id()
    assert VOLUME_ID.fullmatch(one)
    assert one != two
    tokens = VolumeTokens(b"k" * 32)
    assert tokens.admits(tokens.mint(one), one)
    assert not tokens.admits(tokens.mint(one), two)
    assert not VolumeTokens(b"l" * 32).admits(tokens.mint(one), one)
    for wrong in ("", "vol_", tokens.mint(one) + "0", "\udcff", "é"):
        assert not tokens.admits(wrong, one)
