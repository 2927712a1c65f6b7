"""What was asked of Kconfig against what it gave, and the build around that."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import HostError
from vmcell_tools import kernel_build
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.kernel_config import Difference, canonical, differences, parse_config
from vmcell_tools.progress import Progress

OPTIONS = st.dictionaries(
    st.from_regex(r"CONFIG_[A-Z0-9_]{1,12}", fullmatch=True),
    st.one_of(st.just("n"), st.just("y"), st.integers(0, 99).map(str), st.just('"text"')),
)


def as_text(options: dict[str, str]) -> str:
    return "".join(
        f"# {name} is not set\n" if value == "n" else f"{name}={value}\n"
        for name, value in options.items()
    )


@given(OPTIONS)
def test_a_configuration_reads_back_as_written(options: dict[str, str]) -> None:
    assert parse_config(as_text(options), "x") == options


@given(OPTIONS, OPTIONS)
def test_differences_are_exactly_the_asked_options_that_came_out_otherwise(
    asked: dict[str, str], got: dict[str, str]
) -> None:
    found = differences(asked, got)
    assert {row.option for row in found} == {
        name for name, value in asked.items() if got.get(name, "n") != value
    }
    assert not differences(got, got)


def test_a_vanished_option_differs_and_a_vanished_off_does_not() -> None:
    asked = {"CONFIG_FS_DAX": "y", "CONFIG_PCI": "n", "CONFIG_NR_CPUS": "8"}
    got = {"CONFIG_NR_CPUS": "64"}
    assert differences(asked, got) == [
        Difference("CONFIG_FS_DAX", "y", "n"),
        Difference("CONFIG_NR_CPUS", "8", "64"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CONFIG_A=y\nCONFG_B=y\n", ["line 2", "CONFG_B=y"]),
        ("CONFIG_A=\n", ["line 1", "CONFIG_A="]),
        ("CONFIG_A=y\n# CONFIG_A is not set\n", ["line 2", "CONFIG_A again"]),
    ],
)
def test_a_malformed_line_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(HostError) as caught:
        parse_config(text, "fragment")
    assert all(word in str(caught.value) for word in ["fragment", *words])


def test_comments_and_order_do_not_change_the_digest() -> None:
    plain = parse_config("CONFIG_A=y\nCONFIG_B=2\n", "x")
    other = parse_config("# why\n\nCONFIG_B=2\nCONFIG_A=y\n", "x")
    assert canonical(plain) == canonical(other)
    assert canonical(plain) != canonical({**plain, "CONFIG_A": "n"})


def test_our_fragment_asks_for_what_the_machine_has() -> None:
    asked = parse_config(kernel_build.FRAGMENT.read_text(), "fragment")
    assert asked["CONFIG_NR_CPUS"] == "8"
    assert asked["CONFIG_ACPI"] == asked["CONFIG_PCI"] == asked["CONFIG_MODULES"] == "n"
    assert asked["CONFIG_FS_DAX"] == asked["CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"] == "y"


class SmallSource:
    """A source package of a few lines, built by the same tar, make and strip as the kernel."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fragment = folder / "fragment"
        self.fragment.write_text("CONFIG_SMP=y\nCONFIG_FS_DAX=y\n")
        self._tree = folder / kernel_build.SOURCE_PACKAGE
        self._tree.mkdir()
        self._tarball = folder / "source.tar.xz"
        monkeypatch.setattr(kernel_build, "FRAGMENT", self.fragment)
        monkeypatch.setattr(kernel_build, "SOURCE_TARBALL", self._tarball)
        monkeypatch.setattr(kernel_build, "_source_version", lambda: "6.12.1-1")

    def pack(self, *, configure: str, compile: str) -> None:
        """`configure` and `compile` are the shell lines of the two make targets."""
        text = f"allnoconfig:\n\t{configure}\nvmlinux:\n\t{compile}\n"
        (self._tree / "Makefile").write_text(text)
        # an executable to be stripped, as vmlinux is
        shutil.copyfile("/usr/bin/true", self._tree / "program")
        subprocess.run(
            ["tar", "-caf", self._tarball, "-C", self._tree.parent, self._tree.name],
            check=True,
            timeout=60,
        )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallSource:
    return SmallSource(tmp_path, monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> BuildCache:
    return BuildCache(tmp_path / "cache")


QUIET = Progress("test", quiet=True)
HONOURED = "cp $(KCONFIG_ALLCONFIG) .config"
COMPILED = "cp program vmlinux; touch System.map; echo '  CC  program'"


def test_a_second_build_returns_at_once(source: SmallSource, cache: BuildCache) -> None:
    source.pack(configure=HONOURED, compile=COMPILED)
    assert kernel_build.find_kernel(cache) is None
    built = kernel_build.build_kernel(cache, QUIET)
    assert sorted(path.name for path in built.parent.iterdir()) == [
        "System.map",
        "config",
        "vmlinux",
    ]
    source.pack(configure="false", compile="false")
    source.fragment.write_text("# only a comment more\nCONFIG_FS_DAX=y\nCONFIG_SMP=y\n")
    assert kernel_build.build_kernel(cache, QUIET) == built == kernel_build.find_kernel(cache)
    assert not list((cache.root / kernel_build.TREE_KIND).glob("6*"))


def test_an_option_that_vanished_fails_the_build_by_name(
    source: SmallSource, cache: BuildCache
) -> None:
    source.pack(configure="grep -v FS_DAX $(KCONFIG_ALLCONFIG) > .config", compile=COMPILED)
    with pytest.raises(HostError, match="CONFIG_FS_DAX asked y got n"):
        kernel_build.build_kernel(cache, QUIET)
    assert kernel_build.find_kernel(cache) is None


def test_an_interrupted_build_goes_on_in_the_same_tree(
    source: SmallSource, cache: BuildCache
) -> None:
    once = f"test -e half || {{ touch half; exit 1; }}; {COMPILED}"
    source.pack(configure=HONOURED, compile=once)
    with pytest.raises(HostError, match="make failed"):
        kernel_build.build_kernel(cache, QUIET)
    assert kernel_build.find_kernel(cache) is None
    assert kernel_build.build_kernel(cache, QUIET).exists()


def test_a_full_disk_while_compiling_leaves_no_tree(source: SmallSource, cache: BuildCache) -> None:
    source.pack(configure=HONOURED, compile="cat /dev/zero > /dev/full")
    with pytest.raises(HostError, match="no space left") as caught:
        kernel_build.build_kernel(cache, QUIET)
    assert caught.value.code == "resource_exhausted"
    left = [path for path in cache.root.rglob("*") if path.is_file() and path.name != ".lock"]
    assert not left
