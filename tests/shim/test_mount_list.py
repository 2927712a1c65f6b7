"""Lists of mounts as the erofs snapshotter of containerd 2.2 to 2.4 writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_protos.task import Mount
from vmcell_shim.mount_list import MountList, is_mount_list, read_mount_list

RW = "/var/lib/containerd/snapshots/9/rwlayer.img"


def layer(number: int, *options: str) -> Mount:
    source = f"/var/lib/containerd/snapshots/{number}/layer.erofs"
    return Mount(type="erofs", source=source, options=["ro", "loop", *options])


def mkfs(size: str = "67108864", *options: str) -> Mount:
    made = ["X-containerd.mkfs.fs=ext4", f"X-containerd.mkfs.size={size}", "rw", "loop"]
    return Mount(type="mkfs/ext4", source=RW, options=[*made, *options])


def joined(*options: str, kind: str = "format/mkdir/overlay") -> Mount:
    return Mount(type=kind, source="overlay", options=list(options))


QUOTA = (
    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
    "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
    "workdir={{ mount 0 }}/work",
    "upperdir={{ mount 0 }}/upper",
)


def test_layers_with_a_directory_for_writes() -> None:
    upper = "/var/lib/containerd/snapshots/4/fs"
    mounts = [
        layer(3),
        layer(2),
        joined("workdir=/w", f"upperdir={upper}", "lowerdir={{ overlay 0 1 }}"),
    ]
    assert read_mount_list(mounts) == MountList(
        layers=(layer(3).source, layer(2).source), upper=upper
    )


def test_one_layer_with_a_directory_for_writes() -> None:
    mounts = [layer(1), joined("workdir=/w", "upperdir=/u", "lowerdir={{ mount 0 }}")]
    assert read_mount_list(mounts) == MountList(layers=(layer(1).source,), upper="/u")


@pytest.mark.parametrize(
    ("size", "mib"),
    [("67108864", 64), ("67108865", 65), ("64MiB", 64), ("1g", 1024), ("2GB", 2048)],
)
def test_a_file_for_writes_that_we_make(size: str, mib: int) -> None:
    mounts = [mkfs(size), layer(2), layer(1), joined(*QUOTA, "lowerdir={{ overlay 1 2 }}")]
    assert read_mount_list(mounts) == MountList(
        layers=(layer(2).source, layer(1).source), disk=RW, disk_mib=mib
    )


def test_a_file_for_writes_that_containerd_made() -> None:
    """For a shim that does not claim mkfs, or a daemon that does not ask."""
    made = Mount(type="ext4", source=RW, options=["rw", "loop"])
    row = read_mount_list([made, layer(1), joined(*QUOTA, "lowerdir={{ mount 1 }}")])
    assert row == MountList(layers=(layer(1).source,), disk=RW, disk_mib=0)


def test_views_are_read_only() -> None:
    assert read_mount_list([layer(1)]) == MountList(layers=(layer(1).source,))
    bind = Mount(type="format/bind", source="{{ mount 0 }}", options=["ro", "rbind"])
    assert read_mount_list([layer(1), bind]) == MountList(layers=(layer(1).source,))
    assert not read_mount_list([layer(2), layer(1), joined("lowerdir={{ overlay 0 1 }}")]).upper


def test_an_index_stands_for_the_layers_it_was_made_from() -> None:
    index = layer(3, "device=/a/1/layer.erofs", "device=/a/2/layer.erofs")
    row = read_mount_list([layer(4), index, joined("lowerdir={{ overlay 0 1 }}", "upperdir=/u")])
    assert row.layers == (layer(4).source, "/a/2/layer.erofs", "/a/1/layer.erofs")


def test_directories_between_layers() -> None:
    row = read_mount_list([layer(1), joined("lowerdir=/top:{{ mount 0 }}:/bottom")])
    assert row.layers == ("/top", layer(1).source, "/bottom")


@pytest.mark.parametrize(
    ("mounts", "named"),
    [
        ([layer(1), Mount(type="xfs", source="/x"), joined("lowerdir={{ mount 0 }}")], "'xfs'"),
        ([layer(1), layer(2)], "ends with"),
        ([layer(1), joined("lowerdir={{ mount 1 }}")], "mount 1"),
        ([layer(1), joined("lowerdir={{ overlay 0 7 }}")], "overlay 0 7"),
        ([layer(1), joined("lowerdir={{ overlay 0 }}")], "overlay 0"),
        ([layer(1), joined("lowerdir={{ source 0 }}")], "source 0"),
        ([layer(1), joined("upperdir=/u")], "neither earlier mounts"),
        ([layer(1), joined("lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/upper")], "upperdir"),
        ([mkfs(), layer(1), joined("lowerdir={{ overlay 0 1 }}")], "file for writes"),
        (
            [mkfs(), layer(1), joined("lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/other")],
            "/other",
        ),
        ([layer(1, "X-containerd.dmverity=/m"), joined("lowerdir={{ mount 0 }}")], "dmverity"),
        ([layer(1, "device=relative"), joined("lowerdir={{ mount 0 }}")], "relative"),
        ([layer(1), joined("X-containerd.new=1", "lowerdir={{ mount 0 }}")], "X-containerd.new"),
        ([layer(1), joined("lowerdir={{ mount 0 }}", kind="magic/overlay")], "magic/overlay"),
        ([layer(1), joined("lowerdir={{ mount 0 }}", "userxattr")], "userxattr"),
        ([mkfs("0"), layer(1), joined("lowerdir={{ mount 1 }}")], "size"),
        ([mkfs("much"), layer(1), joined("lowerdir={{ mount 1 }}")], "much"),
        (
            [mkfs("1m", "X-containerd.mkfs.fs=xfs"), layer(1), joined("lowerdir={{ mount 1 }}")],
            "xfs",
        ),
        (
            [mkfs("1m", "X-containerd.mkfs.uuid=1"), layer(1), joined("lowerdir={{ mount 1 }}")],
            "uuid",
        ),
        ([Mount(type="erofs", source="{{ mount 0 }}")], "absolute path"),
        ([layer(1), Mount(type="format/bind", source="{{ mount 0 }}", options=["rw"])], "ends"),
    ],
)
def test_what_is_not_understood_is_named(mounts: list[Mount], named: str) -> None:
    with pytest.raises(CallerError, match=named):
        read_mount_list(mounts)


@given(st.integers(1, 30), st.booleans(), st.data())
def test_every_range_names_its_layers_in_its_own_order(
    count: int, quota: bool, data: st.DataObject
) -> None:
    first_layer = 1 if quota else 0
    pieces = ([mkfs()] if quota else []) + [layer(count - number) for number in range(count)]
    bounds = st.integers(first_layer, len(pieces) - 1)
    first, last = data.draw(bounds), data.draw(bounds)
    options = [f"lowerdir={{{{ overlay {first} {last} }}}}", *(QUOTA if quota else ())]
    row = read_mount_list([*pieces, joined(*options)])
    step = 1 if first <= last else -1
    expected = [pieces[index].source for index in range(first, last + step, step)]
    assert list(row.layers) == expected
    assert (row.disk, row.disk_mib) == ((RW, 64) if quota else ("", 0))


WORDS = st.sampled_from(
    [
        *("erofs", "ext4", "overlay", "bind", "mkfs/ext4", "format/mkdir/overlay", "/", "", "ro"),
        *("lowerdir=", "lowerdir={{ mount 0 }}", "lowerdir={{ overlay 0 1 }}", "upperdir=/u"),
        *("upperdir={{ mount 0 }}/upper", "device=/x", "X-containerd.mkfs.size=1", "{{", "/x:y"),
    ]
)
TEXT = WORDS | st.text(max_size=30)
MOUNTS = st.lists(
    st.builds(Mount, type=TEXT, source=TEXT, options=st.lists(TEXT, max_size=4)),
    min_size=1,
    max_size=5,
)


@given(MOUNTS)
def test_any_list_is_read_or_refused(mounts: list[Mount]) -> None:
    """And what is read names absolute paths only."""
    if not is_mount_list(mounts):
        return
    try:
        row = read_mount_list(mounts)
    except CallerError:
        return
    assert row.layers
    for path in (*row.layers, *filter(None, (row.upper, row.disk))):
        assert path.startswith("/")
        assert "{{" not in path
