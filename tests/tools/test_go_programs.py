"""How Go modules become programs of the cache; a script stands in for Go."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcell_protos.errors import HostError
from vmcell_tools import go_programs
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.go_programs import GoModule, build_programs, drop_old_builds, find_programs
from vmcell_tools.progress import Progress

QUIET = Progress("test", quiet=True)
MODULE = GoModule(
    kind="thing",
    module="example.org/thing/v2",
    version="v2.1.0",
    checksum="h1:right",
    commands=("thing", "thingctl"),
    tags=("no_one", "no_two"),
    version_variable="example.org/thing/v2/version.Version",
    left_out=("testing.go",),
    unpublished="example.org/thing/tests",
)
# Notes where and how it was called; a build leaves what was asked for.
GO = """#!/bin/sh
echo "$PWD CGO=$CGO_ENABLED $*" >>{calls}
case "$1 $2" in
"mod download")
    echo "go: downloading $4" >&2
    printf '{{"Path": "x", "Dir": "{source}", "Sum": "{checksum}"}}\\n' ;;
build*)
    [ -e testing.go ] && exit 9
    {build}
    while [ "$1" != -o ]; do shift; done
    touch "$2/thing" "$2/thingctl" ;;
esac
"""


@pytest.fixture
def cache(tmp_path: Path) -> BuildCache:
    return BuildCache(tmp_path / "cache")


def put_go(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    checksum: str = "h1:right",
    build: str = ":",
) -> Path:
    """A `go` on PATH; returns the file with its calls."""
    source, calls = tmp_path / "source", tmp_path / "calls"
    source.mkdir(mode=0o755)
    (source / "testing.go").touch(mode=0o444)
    source.chmod(0o555)
    program = tmp_path / "bin/go"
    program.parent.mkdir()
    program.write_text(GO.format(calls=calls, source=source, checksum=checksum, build=build))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return calls


def test_a_module_is_built_once_as_its_own_main_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: BuildCache
) -> None:
    calls = put_go(tmp_path, monkeypatch)
    assert find_programs(MODULE, cache) is None
    directory = build_programs(MODULE, cache, QUIET)
    assert {path.name for path in directory.iterdir()} == {"thing", "thingctl"}
    assert find_programs(MODULE, cache) == directory
    fetched, edited, built = calls.read_text().splitlines()
    assert fetched.endswith(" mod download -json example.org/thing/v2@v2.1.0")
    copy = edited.split()[0]
    assert edited.endswith(
        " mod edit -droprequire=example.org/thing/tests -dropreplace=example.org/thing/tests@v0.0.0"
    )
    assert built.startswith(f"{copy} CGO=0 build ")
    assert not Path(copy).exists()
    assert "-mod=readonly" in built
    assert "-tags no_one,no_two " in built
    assert "-X example.org/thing/v2/version.Version=v2.1.0 " in built
    assert built.endswith(" ./cmd/thing ./cmd/thingctl")
    (tmp_path / "bin/go").unlink()
    assert build_programs(MODULE, cache, QUIET) == directory
    drop_old_builds(MODULE, cache)
    assert find_programs(MODULE, cache) == directory


def test_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: BuildCache
) -> None:
    calls = put_go(tmp_path, monkeypatch, checksum="h1:wrong")
    with pytest.raises(HostError, match="has the checksum h1:wrong, not h1:right"):
        build_programs(MODULE, cache, QUIET)
    assert len(calls.read_text().splitlines()) == 1
    assert find_programs(MODULE, cache) is None


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        ("echo 'go.mod requires go >= 9.9' >&2; exit 1", "requires go >= 9.9"),
        ("echo 'dial tcp: no route to host' >&2; exit 1", "no route to host"),
    ],
)
def test_what_go_says_is_told_and_nothing_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: BuildCache,
    build: str,
    sentence: str,
) -> None:
    put_go(tmp_path, monkeypatch, build=build)
    with pytest.raises(HostError, match=sentence):
        build_programs(MODULE, cache, QUIET)
    assert [path.name for path in (cache.root / "thing").iterdir()] == [".lock"]


def test_what_is_no_answer_of_go_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: BuildCache
) -> None:
    put_go(tmp_path, monkeypatch)
    (tmp_path / "bin/go").write_text("#!/bin/sh\necho nothing of use\n")
    with pytest.raises(HostError, match="nothing of use"):
        build_programs(MODULE, cache, QUIET)


def test_without_go_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: BuildCache
) -> None:
    monkeypatch.setattr(go_programs.shutil, "which", lambda name, path=None: None)
    with pytest.raises(HostError, match="Go is not installed"):
        build_programs(MODULE, cache, QUIET)


def test_every_module_is_pinned() -> None:
    for module in (go_programs.CONTAINERD, go_programs.NERDCTL):
        assert module.checksum.startswith("h1:")
        assert module.version.startswith("v2.")
