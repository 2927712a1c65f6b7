"""1,250 damaged snapshots: none is accepted, each refusal names the file, no VMM is started."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, combinations
from pathlib import Path

import pytest
from shim_harness import Shim, running_shim
from snapshot_calls import checkpoint, disk_of, end, opened, other_shim, restore, save, start

from vmcell_protos.errors import VmcellError
from vmcell_shim import guest
from vmcell_shim.sparse import copy_sparse

FILES = ("manifest.json", "state.json", "memory", "disk")
PACKED = ("manifest.json", "state.json.packed", "memory.packed", "disk.packed")
# How many bits are flipped in each.
FLIPS = {"manifest.json": 420, "state.json": 160, "memory": 240, "disk": 240}
PACKED_FLIPS = 100
LEAST = 1250
CODES = {"data_loss", "failed_precondition"}


class Victim:
    """Two snapshots, of which the first is damaged and made whole again; and who tries them."""

    def __init__(self, shim: Shim, other: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shim, self.other = shim, other
        self.directory = shim.directory / "snapshots/s1"
        self.second = shim.directory / "snapshots/s2"
        self.whole = shim.directory / "whole"
        self.count = 0
        self.spawned = 0
        self._spawn = guest.handle.spawn
        monkeypatch.setattr(guest.handle, "spawn", self._count_spawn)

    def _count_spawn(self, *arguments: object, **options: object) -> object:
        self.spawned += 1
        return self._spawn(*arguments, **options)  # type: ignore[arg-type]  # as they came

    def refused(self, *names: str, snapshot_id: str = "s1", image: Path | None = None) -> None:
        """Whoever goes on from it is told that one of these files is damaged."""
        self.count += 1
        with pytest.raises(VmcellError) as caught:
            restore(self.other, self.shim, "" if image else snapshot_id, checkpoint=image or "")
        text = str(caught.value)
        assert caught.value.code in CODES, text
        assert any(text.startswith(f"{name} of snapshot ") for name in names), text

    @contextmanager
    def changed(self, path: Path) -> Iterator[Path]:
        """The file, which may be written to; afterwards it is what it was."""
        backup = self.whole / path.parent.name / path.name
        path.chmod(0o600)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
            copied(backup, path)


def copied(source: Path, path: Path) -> None:
    with source.open("rb") as reader, path.open("xb") as writer:
        copy_sparse(reader.fileno(), writer.fileno())


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        directory = tmp_path_factory.mktemp("damaged")
        with running_shim(directory, monkeypatch) as shim, other_shim(shim) as other:
            start(shim)
            for number in (1, 2):
                with disk_of(shim, "c1").open("r+b") as disk:
                    disk.seek(number << 20)
                    disk.write(os.urandom(50_000))
                save(shim, f"s{number}")
                image = directory / f"image{number}"
                image.mkdir()
                checkpoint(shim, path=image)
            end(shim)
            # Two snapshots of one container: its own state and memory would be the same in both.
            victim = Victim(shim, other, monkeypatch)
            for place in (victim.directory, victim.second, *directory.glob("image?")):
                (victim.whole / place.name).mkdir(parents=True)
                for path in place.iterdir():
                    copied(path, victim.whole / place.name / path.name)
            yield victim
            sys.stdout.write(f"{victim.count} damaged snapshots were tried\n")
            assert victim.count >= LEAST, f"only {victim.count} damaged snapshots were tried"


@pytest.fixture(autouse=True)
def nothing_of_it_is_left(victim: Victim) -> Iterator[None]:
    """No VMM is started but for the one that goes on from a whole snapshot at the end."""
    before = victim.spawned
    yield
    assert victim.spawned == before
    assert victim.shim.left_behind() == []
    assert sorted(os.listdir(victim.shim.directory / "snapshots")) == ["s1", "s2"]
    with opened("s1"), opened("s2"):
        pass


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(victim: Victim, name: str) -> None:
    """Each at a place by chance, in holes too; every one where they are few."""
    places = random.Random(name)
    path = victim.directory / name
    length = path.stat().st_size
    every = [(at, bit) for at in range(length) for bit in range(8)] if length < 4000 else []
    path.chmod(0o600)
    chosen = every or [(places.randrange(length), places.randrange(8)) for _ in range(FLIPS[name])]
    if len(chosen) > FLIPS[name]:
        chosen = places.sample(chosen, FLIPS[name])
    for at, bit in chosen:
        flip(path, at, bit)
        victim.refused(name)
        flip(path, at, bit)


LENGTHS: dict[str, Callable[[int], int]] = {
    "nothing": lambda length: 0,
    "one byte": lambda length: 1,
    "half": lambda length: length // 2,
    "all but one": lambda length: length - 1,
    "one more": lambda length: length + 1,
    "a block more": lambda length: length + 4096,
    "a gigabyte more": lambda length: length + (1 << 30),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", FILES)
def test_another_length(victim: Victim, name: str, kind: str) -> None:
    with victim.changed(victim.directory / name) as path:
        os.truncate(path, LENGTHS[kind](path.stat().st_size))
        victim.refused(name)


@pytest.mark.parametrize("name", FILES)
def test_random_lengths(victim: Victim, name: str) -> None:
    lengths = random.Random(name)
    whole = (victim.directory / name).stat().st_size
    for _ in range(15):
        with victim.changed(victim.directory / name) as path:
            os.truncate(path, lengths.randrange(whole))
            victim.refused(name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_noise_or_none(victim: Victim, name: str) -> None:
    noise = random.Random(name)
    for length in (1, 100, 4096, 100_000):
        with victim.changed(victim.directory / name) as path:
            path.write_bytes(noise.randbytes(length))
            victim.refused(name)
    with victim.changed(victim.directory / name) as path:
        path.unlink()
        victim.refused(name)


def differing(victim: Victim, places: tuple[Path, Path], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not same(*(place / name for place in places))]


def same(one: Path, two: Path) -> bool:
    return one.read_bytes() == two.read_bytes()


def mixtures(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Every set of them but none and all."""
    yield from chain.from_iterable(combinations(names, n) for n in range(1, len(names)))


def test_files_of_another_snapshot(victim: Victim) -> None:
    """Every mixture of two snapshots, in both places."""
    names = differing(victim, (victim.directory, victim.second), FILES)
    assert {"manifest.json", "disk"} <= set(names)
    for into, out_of in ((victim.directory, victim.second), (victim.second, victim.directory)):
        for mixture in mixtures(names):
            for name in mixture:
                (into / name).unlink()
                copied(victim.whole / out_of.name / name, into / name)
            victim.refused(*names, snapshot_id=into.name)
            for name in mixture:
                (into / name).unlink()
                copied(victim.whole / into.name / name, into / name)


def test_files_in_each_others_place(victim: Victim) -> None:
    """Of one snapshot: each two of them swapped."""
    for one, two in combinations(FILES, 2):
        paths = [victim.directory / one, victim.directory / two]
        spare = victim.shim.directory / "spare"
        swap(paths, spare)
        victim.refused(one, two)
        swap(paths, spare)


def swap(paths: list[Path], spare: Path) -> None:
    paths[0].rename(spare)
    paths[1].rename(paths[0])
    spare.rename(paths[1])


# ---- checkpoint images, whose author can be anybody ----------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_flipped_bits_of_a_checkpoint_image(victim: Victim, name: str) -> None:
    places = random.Random(name)
    image = victim.shim.directory / "image1"
    path = image / name
    length = path.stat().st_size
    for _ in range(PACKED_FLIPS):
        at, bit = places.randrange(length), places.randrange(8)
        flip(path, at, bit)
        refused_image(victim, image, name)
        flip(path, at, bit)


def refused_image(victim: Victim, image: Path, *names: str) -> None:
    """A piece whose content has changed shows in the file that is unpacked."""
    victim.refused(*names, *(name.removesuffix(".packed") for name in names), image=image)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", PACKED)
def test_another_length_in_a_checkpoint_image(victim: Victim, name: str, kind: str) -> None:
    image = victim.shim.directory / "image1"
    with victim.changed(image / name) as path:
        os.truncate(path, LENGTHS[kind](path.stat().st_size))
        refused_image(victim, image, name)


def test_a_mixture_of_checkpoint_images(victim: Victim) -> None:
    image, second = (victim.shim.directory / f"image{number}" for number in (1, 2))
    names = differing(victim, (image, second), PACKED)
    for mixture in mixtures(names):
        for name in mixture:
            shutil.copyfile(victim.whole / "image2" / name, image / name)
        refused_image(victim, image, *names)
        for name in mixture:
            shutil.copyfile(victim.whole / "image1" / name, image / name)


def test_links_and_fifos_in_a_checkpoint_image(victim: Victim) -> None:
    """What an archive can make of a name."""
    image = victim.shim.directory / "image1"
    for name in PACKED:
        with victim.changed(image / name) as path:
            path.unlink()
            path.symlink_to(victim.whole / "image1" / name)
            refused_image(victim, image, name)
        with victim.changed(image / name) as path:
            path.unlink()
            os.mkfifo(path)
            refused_image(victim, image, name)


# ---- and the same ones whole -------------------------------------------------------------------


class TestWhole:
    """The last: what was damaged and made whole again is accepted."""

    def test_whole(self, victim: Victim) -> None:
        before = victim.spawned
        for image in ("", victim.shim.directory / "image1"):
            restore(victim.other, victim.shim, "" if image else "s1", checkpoint=image)
            victim.other.start(container_id="c2")
            end(victim.other, "c2")
        assert victim.spawned == before + 2
        victim.spawned = before
