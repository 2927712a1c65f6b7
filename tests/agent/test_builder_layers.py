"""Layers of what was written in a container: a real agent, overlay, EROFS and envd on this host."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import stat
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import AgentUnderTest, make_busybox_tree, make_erofs, running_agent
from builder_guest import BuilderGuest, apply_layer, builder_guest

from vmcell_api.node.guest_process import Command, CommandRefused
from vmcell_protos.errors import HostError

pytestmark = pytest.mark.root
# What is looked at of the container's root; the rest is the kernel's.
PLACES = ("home", "etc", "var", "opt", "data")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the image: busybox, and something to delete and replace."""
    tree = tmp_path_factory.mktemp("base") / "tree"
    make_busybox_tree(tree)
    for path in ("data/kept", "data/gone", "data/dir/a", "data/dir/b", "data/dir/sub/c", "opt/x"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(f"{path} of the image\n")
    return tree


@pytest.fixture
def guest(base: Path) -> Iterator[BuilderGuest]:
    image = make_erofs(base, base.parent / f"{time.monotonic_ns()}.erofs")
    with running_agent() as agent:
        yield from _builder(agent, image)


def _builder(agent: AgentUnderTest, image: Path) -> Iterator[BuilderGuest]:
    agent.attach_lower(image)
    agent.attach_upper()
    with builder_guest(agent) as running:
        yield running


def _names(layer: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        return {member.name: member for member in tar.getmembers()}


def _seen(guest: BuilderGuest) -> list[str]:
    """Every path of the container below PLACES: kind, mode, owner, content or target."""
    script = (
        "cd /; for p in $(find " + " ".join(PLACES) + " 2>/dev/null | sort); do "
        'if [ -L "$p" ]; then echo "$p l $(readlink $p)"; '
        'elif [ -d "$p" ]; then echo "$p d $(stat -c %a:%u:%g $p)"; '
        'else echo "$p f $(stat -c %a:%u:%g $p) $(md5sum < $p)"; fi; done'
    )
    return guest.sh(script).splitlines()


def _on_host(tree: Path, guest: BuilderGuest) -> list[str]:

    rows = []
    for path in sorted(tree.rglob("*"), key=lambda row: str(row.relative_to(tree))):
        name = str(path.relative_to(tree))
        if name.split("/")[0] not in PLACES:
            continue
        status = path.lstat()
        mode = f"{stat.S_IMODE(status.st_mode):o}:{status.st_uid}:{status.st_gid}"
        if path.is_symlink():
            rows.append(f"{name} l {path.readlink()}")
        elif path.is_dir():
            rows.append(f"{name} d {mode}")
        else:
            rows.append(f"{name} f {mode} {hashlib.md5(path.read_bytes()).hexdigest()}  -")
    return rows


def test_nothing_written_is_an_empty_layer(guest: BuilderGuest) -> None:
    assert guest.layer() == bytes(1024)
    assert guest.layer() == bytes(1024)


def test_each_layer_holds_what_changed_since_the_last(guest: BuilderGuest) -> None:
    guest.sh("echo one > /data/new; chmod 640 /data/new; ln -s new /data/link; rm /data/gone")
    first = _names(guest.layer())
    assert set(first) == {"data", "data/new", "data/link", "data/.wh.gone"}
    assert (first["data/new"].mode, first["data/new"].size) == (0o640, 4)
    assert first["data/link"].linkname == "new"

    guest.sh("rm /data/new; mkdir -p /opt/deep/er; echo two > /opt/deep/er/file")
    second = _names(guest.layer())
    assert "data/.wh.new" in second, "written in the layer before, gone in this one"
    assert {"opt/deep", "opt/deep/er", "opt/deep/er/file"} <= set(second)
    assert "data/link" not in second

    guest.sh("rm -r /data/dir; mkdir /data/dir; echo new > /data/dir/b")
    third = _names(guest.layer())
    assert "data/dir/.wh..wh..opq" in third
    assert "data/dir/b" in third
    guest.sh("echo more > /data/dir/c")
    fourth = _names(guest.layer())
    assert set(fourth) == {"data/dir", "data/dir/c"}, "an opaque mark is told once"


def test_links_owners_and_capabilities_are_kept(guest: BuilderGuest) -> None:
    guest.sh(
        "echo x > /data/one; ln /data/one /data/two; chown 1000:1000 /data/one; mkfifo /data/p"
    )
    names = _names(guest.layer())
    linked = {name: member for name, member in names.items() if name in ("data/one", "data/two")}
    assert sorted(member.type for member in linked.values()) == [tarfile.REGTYPE, tarfile.LNKTYPE]
    assert all(member.uid == 1000 for member in linked.values() if member.isreg())
    assert names["data/p"].isfifo()


def test_a_name_that_means_removal_is_refused(guest: BuilderGuest) -> None:
    guest.sh("echo x > /data/.wh.trick")

    with pytest.raises(HostError, match="trick"):
        guest.layer()


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_come_out_as_they_are(
    guest: BuilderGuest, base: Path, tmp_path: Path, seed: int
) -> None:
    """After every layer the image with all layers applied is what the container shows."""

    rng = random.Random(seed)
    tree = tmp_path / "applied"
    shutil.copytree(base, tree, symlinks=True)
    for _ in range(6):
        guest.sh("; ".join(_change(rng) for _ in range(14)) + "; true")
        apply_layer(tree, guest.layer())
        assert _on_host(tree, guest) == _seen(guest)


def _change(rng: random.Random) -> str:
    def path() -> str:
        parts = ["data", *rng.choices(("dir", "a", "b", "sub", "kept"), k=rng.randint(1, 3))]
        return "/" + "/".join(parts)

    one, other = path(), path()
    return rng.choice(
        (
            f"mkdir -p {one} 2>/dev/null",
            f"rm -rf {one}",
            f"[ -d {one} ] || echo {rng.random()} > {one} 2>/dev/null",
            f"mv {one} {other} 2>/dev/null",
            f"[ -d {one} ] || ln -s kept {one} 2>/dev/null",
            f"[ -d {one} ] || [ -L {one} ] || ln {one} {other} 2>/dev/null",
            f"[ -L {one} ] || chmod {rng.choice(('700', '755', '644'))} {one} 2>/dev/null",
            f"cp -r /data/dir {one} 2>/dev/null",
        )
    )


def test_commands_have_users_and_envds_own_words(guest: BuilderGuest) -> None:
    assert guest.sh("id -u", user="user") == "1000\n"
    with pytest.raises(CommandRefused) as caught:
        guest.sh("whoami", user="root123")
    assert str(caught.value) == "unauthenticated: invalid username: 'root123'"
    output = []
    with pytest.raises(Exception, match="did not end in time"):
        guest.processes.run(
            Command(text="sleep 60"),
            deadline=time.monotonic() + 1,
            on_output=lambda kind, data: output.append(data),
        )


def test_the_upper_directory_has_no_path_inside(guest: BuilderGuest) -> None:
    assert "upper" not in guest.sh("cat /proc/self/mountinfo | grep -v ' / / ' || true")
