"""The files of a volume that a guest has made as nasty as it can; nothing here needs root."""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmcell_api.volumes import clearing, listing
from vmcell_api.volumes.files import Ownership, VolumeFiles, Volumes, parse_path
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.names import new_volume_id
from vmcell_protos.errors import CallerError, HostError

SECRET = "the host's own"


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """A volume's files by our verbs, its directory as a guest has it, and a file of the host."""

    files: VolumeFiles
    root: Path
    outside: Path
    top: Path


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    folders = VolumeFolders(str(tmp_path / "volumes"))
    folders.prepare()
    volume_id = new_volume_id()
    folders.make(volume_id)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    volumes = Volumes(str(tmp_path / "volumes"), (os.geteuid(), os.getegid()))
    try:
        with volumes.volume(volume_id) as files:
            yield Hostile(
                files=files,
                root=Path(folders.path(volume_id)),
                outside=outside,
                top=tmp_path / "volumes",
            )
    finally:
        volumes.close()
    assert (outside / "secret").read_text() == SECRET
    assert sorted(os.listdir(outside)) == ["secret"]
    assert os.listdir(tmp_path / "volumes" / "trash") == []
    assert os.listdir(tmp_path / "volumes" / "uploads") == []


def _put(files: VolumeFiles, path: str, data: bytes = b"new", *, force: bool = False) -> None:
    with files.upload() as upload:
        upload.write(data)
        files.put(upload, parse_path(path), Ownership(), force=force)


def _read(files: VolumeFiles, path: str) -> bytes:
    with files.open_file(parse_path(path)) as (fd, status):
        return os.pread(fd, status.st_size, 0)


def _every_verb(files: VolumeFiles, path: str) -> dict[str, Exception | None]:
    """What each verb that would touch the target of a link does."""
    verbs = {
        "read": lambda: _read(files, path),
        "put": lambda: _put(files, path),
        "put force": lambda: _put(files, path, force=True),
        "change": lambda: files.change(parse_path(path), Ownership(mode=0o777)),
        "list": lambda: files.list(parse_path(path), 1),
        "make": lambda: files.make_directory(parse_path(path), Ownership(), force=True),
    }
    outcome: dict[str, Exception | None] = {}
    for name, verb in verbs.items():
        try:
            verb()
            outcome[name] = None
        except (CallerError, HostError) as error:
            outcome[name] = error
    return outcome


def test_links_are_shown_and_never_followed(hostile: Hostile) -> None:
    secret = hostile.outside / "secret"
    (hostile.root / "file").symlink_to(secret)
    (hostile.root / "folder").symlink_to(hostile.outside)
    (hostile.root / "up").symlink_to("../../outside/secret")
    (hostile.root / "magic").symlink_to("/proc/self/root")
    before = secret.stat().st_mode
    for path in ("file", "folder", "up", "magic", "folder/secret", "folder/new", "magic/etc"):
        for verb, error in _every_verb(hostile.files, path).items():
            assert isinstance(error, CallerError), f"{verb} of {path}: {error}"
    assert secret.stat().st_mode == before
    shown = hostile.files.look((b"file",)).json()
    assert (shown["type"], shown["target"]) == ("symlink", str(secret))
    assert {entry.json()["type"] for entry in hostile.files.list((), 5)} == {"symlink"}
    for name in ("file", "folder", "up", "magic"):
        hostile.files.remove((name.encode(),))
    assert os.listdir(hostile.root) == []


SWAPS_S = 60


def test_a_link_put_in_the_way_while_we_look(hostile: Hostile) -> None:
    """A directory that turns into a link to the outside and back, as fast as a guest can."""
    (hostile.root / "real").mkdir()
    (hostile.root / "real" / "secret").write_text("the volume's own")
    (hostile.root / "link").symlink_to(hostile.outside)
    (hostile.root / "spot").mkdir()
    (hostile.root / "spot" / "secret").write_text("the volume's own")
    ending = threading.Event()

    def swap() -> None:
        spot, aside = hostile.root / "spot", hostile.root / "aside"
        while not ending.is_set():
            os.rename(spot, aside)
            os.symlink(hostile.outside, spot)
            os.unlink(spot)
            os.rename(aside, spot)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = {"read": 0, "refused": 0}
    try:
        deadline = time.monotonic() + SWAPS_S
        for number in itertools.count():
            # A busy machine may leave the other thread no turn for long.
            if (number >= 3000 and all(seen.values())) or time.monotonic() > deadline:
                break
            try:
                assert _read(hostile.files, "spot/secret") == b"the volume's own"
                seen["read"] += 1
            except CallerError:
                seen["refused"] += 1
        for number in range(300):
            try:
                _put(hostile.files, f"spot/{number}")
            except CallerError:
                seen["refused"] += 1
    finally:
        ending.set()
        thread.join()
    assert seen["read"] > 0, seen
    assert seen["refused"] > 0, seen


def test_what_is_no_file_is_not_opened(hostile: Hostile) -> None:
    os.mkfifo(hostile.root / "fifo")
    for verb, error in _every_verb(hostile.files, "fifo").items():
        assert isinstance(error, CallerError), f"{verb}: {error}"
    assert hostile.files.look((b"fifo",)).json()["type"] == "unknown"
    hostile.files.remove((b"fifo",))
    with pytest.raises(CallerError, match="it is a directory"):
        _read(hostile.files, "/")
    with pytest.raises(CallerError, match="root of a volume"):
        hostile.files.remove(())


def test_files_and_directories_as_they_should_be(hostile: Hostile) -> None:
    files = hostile.files
    made = files.make_directory(parse_path("/a/b"), Ownership(mode=0o750), force=True).json()
    assert (made["path"], made["name"], made["type"], made["mode"]) == (
        "/a/b",
        "b",
        "directory",
        0o750,
    )
    with pytest.raises(CallerError) as caught:
        files.make_directory(parse_path("a/b"), Ownership(), force=False)
    assert caught.value.code == "already_exists"
    with pytest.raises(CallerError) as caught:
        files.make_directory(parse_path("no/b"), Ownership(), force=False)
    assert caught.value.code == "not_found"
    _put(files, "a/b/one", b"first")
    with pytest.raises(CallerError) as caught:
        _put(files, "a/b/one", b"second")
    assert caught.value.code == "already_exists"
    assert _read(files, "a/b/one") == b"first"
    _put(files, "a/b/one", b"second", force=True)
    assert _read(files, "a/b/one") == b"second"
    _put(files, "p/q/r", b"deep", force=True)
    with pytest.raises(CallerError, match="no file"):
        _put(files, "a/b", force=True)
    changed = files.change(parse_path("p/q/r"), Ownership(mode=0o600)).json()
    assert (changed["mode"], changed["size"], changed["path"]) == (0o600, 4, "/p/q/r")
    shown = [entry.json()["path"] for entry in files.list((), 3)]
    assert shown == ["/a", "/a/b", "/a/b/one", "/p", "/p/q", "/p/q/r"]
    assert [entry.json()["path"] for entry in files.list((), 1)] == ["/a", "/p"]
    files.remove(parse_path("a"))
    with pytest.raises(CallerError) as caught:
        files.look(parse_path("a"))
    assert caught.value.code == "not_found"
    with pytest.raises(CallerError) as caught:
        files.remove(parse_path("a"))
    assert caught.value.code == "not_found"
    assert files.look(()).json()["path"] == "/"


def test_an_upload_that_is_given_up_leaves_the_old_file(hostile: Hostile) -> None:
    _put(hostile.files, "kept", b"old")
    with hostile.files.upload() as upload:
        upload.write(b"half of it")
    assert _read(hostile.files, "kept") == b"old"
    assert os.listdir(hostile.top / "uploads") == []


def test_a_hard_link_shares_what_it_shares_and_is_replaced_alone(hostile: Hostile) -> None:
    (hostile.root / "one").write_text("same")
    os.link(hostile.root / "one", hostile.root / "two")
    _put(hostile.files, "two", b"other", force=True)
    assert (hostile.root / "one").read_text() == "same"
    hostile.files.remove((b"one",))
    assert _read(hostile.files, "two") == b"other"


def test_ten_thousand_entries(hostile: Hostile) -> None:
    (hostile.root / "many").mkdir()
    for number in range(10_000):
        (hostile.root / "many" / f"{number:05}").touch()
    entries = hostile.files.list((b"many",), 1)
    assert [entry.parts[-1] for entry in entries] == [b"%05d" % number for number in range(10_000)]
    assert len(hostile.files.list((), 2)) == 10_001
    hostile.files.remove((b"many",))
    assert os.listdir(hostile.root) == []


def test_a_list_has_a_bound(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_ENTRIES", 10)
    for number in range(10):
        (hostile.root / str(number)).mkdir()
    assert len(hostile.files.list((), 2)) == 10
    (hostile.root / "0" / "more").touch()
    assert len(hostile.files.list((), 1)) == 10
    with pytest.raises(CallerError, match="more than 10 entries"):
        hostile.files.list((), 2)


def test_a_tree_deeper_than_any_path(hostile: Hostile) -> None:
    depth = 3000
    here = os.open(hostile.root, os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir("d" * 20, dir_fd=here)
            below = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    finally:
        os.close(here)
    assert len(hostile.files.list((), listing.MAX_DEPTH)) == listing.MAX_DEPTH
    hostile.files.remove((b"d" * 20,))
    assert os.listdir(hostile.root) == []


def test_odd_names_and_times_are_shown(hostile: Hostile) -> None:
    odd = os.open(os.fsencode(hostile.root) + b"/\xff\xfe\n", os.O_CREAT | os.O_WRONLY)
    os.close(odd)
    (hostile.root / "future").touch()
    os.utime(hostile.root / "future", (2**33, 2**33))
    (hostile.root / "past").touch()
    os.utime(hostile.root / "past", (-(2**31), -(2**31)))
    shown = {entry.json()["name"]: entry.json() for entry in hostile.files.list((), 1)}
    assert "\ufffd\ufffd\n" in shown
    assert str(shown["past"]["mtime"]).startswith("1901-")
    assert str(shown["future"]["mtime"]).startswith("2242-")


def test_a_directory_that_is_filled_while_it_is_removed(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hostile.root / "busy").mkdir()
    held = os.open(hostile.root / "busy", os.O_RDONLY)
    real, calls = os.rmdir, []

    def slow(name: str, *, dir_fd: int) -> None:
        calls.append(name)
        if len(calls) < 4:
            os.close(os.open(f"late{len(calls)}", os.O_CREAT | os.O_WRONLY, dir_fd=held))
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(clearing.os, "rmdir", slow)
    hostile.files.remove((b"busy",))
    os.close(held)
    assert len(calls) == 4
    assert os.listdir(hostile.root) == []


def test_the_volumes_are_closed_to_others_and_swept(tmp_path: Path) -> None:
    folders = VolumeFolders(str(tmp_path / "v"))
    folders.prepare()
    assert stat.S_IMODE((tmp_path / "v").stat().st_mode) == 0o700
    volume_id = new_volume_id()
    folders.make(volume_id)
    assert stat.S_IMODE(Path(folders.path(volume_id)).stat().st_mode) == 0o777
    (Path(folders.path(volume_id)) / "kept").touch()
    folders.make(volume_id)
    assert os.listdir(folders.path(volume_id)) == ["kept"]
    assert folders.discard(volume_id) is not None
    assert folders.discard(volume_id) is None
    assert not folders.exists(volume_id)
    (tmp_path / "v" / "uploads" / "left").touch()
    folders.empty_trash()
    folders.drop_uploads()
    assert os.listdir(tmp_path / "v" / "trash") == []
    assert os.listdir(tmp_path / "v" / "uploads") == []
    for name in ("..", "", "v" + "/" * 19, "../outside"):
        with pytest.raises(HostError, match="no volume id"):
            folders.path(name)
