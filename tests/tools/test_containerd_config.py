"""What `vmcell setup` writes for containerd, and what it makes of a configuration that is there."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.annotations import NAMES, PREFIX
from vmcell_tools import containerd_setup
from vmcell_tools.containerd_config import (
    CRI_V2,
    CRI_V3,
    HANDLER,
    POD_ANNOTATIONS,
    SNIPPETS,
    Snippet,
    cri_is_disabled,
    fitting_snippet,
    merged,
    parse_version,
    runtimes_of,
    without_block,
)

OLD, SEVEN, TWO = SNIPPETS
# Debian's, and one as kubeadm users have it.
DEBIAN = f"""version = 2

[plugins]
  [plugins."{CRI_V2}"]
    [plugins."{CRI_V2}".cni]
      bin_dir = "/usr/lib/cni"
"""
WITH_RUNC = f"""version = 2
[plugins."{CRI_V2}".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."{CRI_V2}".containerd.runtimes.runc.options]
    SystemdCgroup = true
"""


@pytest.mark.parametrize(
    ("row", "plugin"), [(OLD, CRI_V2), (SEVEN, CRI_V2), (TWO, CRI_V3)], ids=lambda value: str(value)
)
def test_snippets_are_toml_for_the_right_plugin(row: Snippet, plugin: str) -> None:
    table = tomllib.loads(row.text)["plugins"][plugin]["containerd"]["runtimes"][HANDLER]
    assert table == {
        "runtime_type": "io.containerd.vmcell.v2",
        "pod_annotations": list(POD_ANNOTATIONS),
        "privileged_without_host_devices": True,
    }


def test_what_a_snippet_says_in_comments_is_toml_too() -> None:
    """Someone will take it in by removing the marks."""
    for row in SNIPPETS:
        lines = row.text.splitlines()
        (first,) = [number for number, line in enumerate(lines) if "runtimes.runc" in line]
        text = "\n".join(line.removeprefix("# ") for line in lines[first : first + 2])
        assert tomllib.loads(text)["plugins"][row.plugin]["containerd"]["runtimes"]["runc"]
        for line in lines:
            if "snapshotter = " in line:
                assert tomllib.loads(line.split("# ", 1)[1])["snapshotter"]


def test_pods_may_size_their_vm_and_nothing_else() -> None:
    """A pod that may name a TAP of the host takes another one's network."""
    for name in POD_ANNOTATIONS:
        assert name.removeprefix(PREFIX) in NAMES
        assert "net." not in name


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1", (1, 6)),
        ("containerd github.com/containerd/containerd/v2 v2.3.4 1a43cb6", (2, 3)),
        ("containerd github.com/containerd/containerd/v2 2.4.0-beta.0 1a43cb6", (2, 4)),
        ("containerd containerd.io 1.7.29 442cb34", (1, 7)),
        ("something else", None),
        ("a b c", None),
        ("", None),
    ],
)
def test_versions(output: str, version: tuple[int, int] | None) -> None:
    assert parse_version(output) == version


@pytest.mark.parametrize(
    ("containerd", "config", "snippet"),
    [
        ((1, 6), None, OLD),
        ((1, 6), DEBIAN, OLD),
        ((1, 7), DEBIAN, SEVEN),
        ((2, 2), None, TWO),
        ((2, 2), "version = 3\n", TWO),
        ((2, 3), "version = 4\n", TWO),
        ((2, 2), DEBIAN, SEVEN),
        ((3, 0), None, TWO),
    ],
)
def test_the_snippet_that_fits(
    containerd: tuple[int, int], config: str | None, snippet: Snippet
) -> None:
    assert fitting_snippet(containerd, config) == snippet


@pytest.mark.parametrize(
    ("containerd", "config", "sentence"),
    [
        ((1, 5), None, "1.5 is too old"),
        ((1, 7), "version = 3\n", "version 3"),
        ((2, 3), "version = 5\n", "version 5"),
        ((1, 7), "", "version 1"),
        ((2, 0), "version = 'x'\n", "version 'x'"),
        ((2, 0), "version = ", "not TOML"),
    ],
)
def test_no_snippet_fits(containerd: tuple[int, int], config: str | None, sentence: str) -> None:
    with pytest.raises(HostError, match=sentence):
        fitting_snippet(containerd, config)


@pytest.mark.parametrize("config", [None, DEBIAN, WITH_RUNC, DEBIAN.rstrip("\n"), DEBIAN + "\n"])
def test_merging_keeps_what_is_there_and_runc(config: str | None) -> None:
    after = merged(config, SEVEN)
    before = tomllib.loads(config) if config else {"version": 2}
    tree = tomllib.loads(after)
    runtimes = tree["plugins"][CRI_V2]["containerd"]["runtimes"]
    assert runtimes.pop(HANDLER)["runtime_type"] == "io.containerd.vmcell.v2"
    assert runtimes["runc"]["runtime_type"] == "io.containerd.runc.v2"
    if config == WITH_RUNC:
        assert tree == before
    assert after.startswith(config or "version = 2\n")
    assert merged(after, SEVEN) == after
    assert HANDLER not in runtimes_of(without_block(after))
    if config is not None and config.endswith("\n"):
        assert without_block(after).rstrip("\n") == config.rstrip("\n")


def test_a_newer_snippet_takes_the_place_of_an_older_one() -> None:
    after = merged(merged(DEBIAN, OLD), SEVEN)
    assert after == merged(DEBIAN, SEVEN)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (WITH_RUNC + SEVEN.text, "of its own making"),
        ("version = 2\nplugins = {}\n", "not TOML"),
        (DEBIAN + "# vmcell: begin\n", "one block"),
        (DEBIAN + "# vmcell: end\n# vmcell: begin\n", "one block"),
    ],
)
def test_what_cannot_be_merged_is_said(config: str, sentence: str) -> None:
    with pytest.raises(HostError, match=sentence):
        merged(config, SEVEN)


@given(st.text(alphabet="a\n#", max_size=30))
def test_taking_out_gives_back_what_was_there(text: str) -> None:
    config = "version = 2\n" + "".join(f"# {line}\n" for line in text.splitlines())
    after = without_block(merged(config, SEVEN))
    assert after.rstrip("\n") == config.rstrip("\n")


def test_dockers_configuration_disables_cri() -> None:
    assert cri_is_disabled('disabled_plugins = ["cri"]\n')
    assert not cri_is_disabled(DEBIAN)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A root with containerd's configuration and a program that says it is 1.7."""
    (tmp_path / "etc/containerd").mkdir(parents=True)
    (tmp_path / "etc/containerd/config.toml").write_text(DEBIAN)
    (tmp_path / "etc/containerd/config.toml").chmod(0o640)
    put_containerd(tmp_path)
    return tmp_path


def put_containerd(root: Path, dump: str = "exit 0") -> None:
    program = root / "bin/containerd"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo containerd x 1.7.2 y && exit\n{dump}\n'
    )
    program.chmod(0o755)


def config_of(root: Path) -> str:
    return (root / "etc/containerd/config.toml").read_text()


def names_of(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "etc/containerd").iterdir())


def test_merge_and_back(host: Path) -> None:
    path = str(host / "bin")
    assert "append /etc/vmcell/containerd/containerd-1.7.toml" in containerd_setup.advice(
        host, path
    )
    done = containerd_setup.merge(host, path)
    assert len(done) == 3
    assert "restart containerd" in done[-1]
    assert HANDLER in runtimes_of(config_of(host))
    (backup,) = [name for name in names_of(host) if name != "config.toml"]
    assert (host / "etc/containerd" / backup).read_text() == DEBIAN
    assert (host / "etc/containerd/config.toml").stat().st_mode & 0o777 == 0o640
    assert containerd_setup.advice(host, path).endswith("has the runtime vmcell")
    assert containerd_setup.merge(host, path) == []
    assert len(names_of(host)) == 2
    containerd_setup.unmerge(host, path)
    assert config_of(host) == DEBIAN
    assert containerd_setup.unmerge(host, path) == []
    assert len(names_of(host)) == 3


def test_merge_where_there_is_no_configuration(host: Path) -> None:
    (host / "etc/containerd/config.toml").unlink()
    assert len(containerd_setup.merge(host, str(host / "bin"))) == 2
    assert config_of(host).startswith("version = 2\n")
    assert names_of(host) == ["config.toml"]


def test_a_configuration_that_containerd_refuses_is_not_put_in_place(host: Path) -> None:
    put_containerd(host, dump="exit 1")
    with pytest.raises(HostError, match="does not take the new"):
        containerd_setup.merge(host, str(host / "bin"))
    assert config_of(host) == DEBIAN
    assert names_of(host) == ["config.toml"]


def test_without_containerd(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="apt-get install containerd"):
        containerd_setup.merge(tmp_path, str(tmp_path))
    assert "not installed" in containerd_setup.advice(tmp_path, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_advice_on_a_configuration_that_is_wrong(host: Path) -> None:
    path = str(host / "bin")
    (host / "etc/containerd/config.toml").write_text("version = ")
    assert "not TOML" in containerd_setup.advice(host, path)
    (host / "etc/containerd/config.toml").write_text('version = 2\ndisabled_plugins = ["cri"]\n')
    assert "disables CRI" in containerd_setup.advice(host, path)


@pytest.mark.root
@pytest.mark.parametrize("config", [None, DEBIAN, WITH_RUNC])
def test_the_installed_containerd_takes_it(tmp_path: Path, config: str | None) -> None:
    """And keeps runc, which it forgets as soon as the file names another runtime."""
    version = containerd_setup.installed_version()
    assert version is not None
    text = merged(config, fitting_snippet(version, config))
    (tmp_path / "config.toml").write_text(text)
    words = ["containerd", "--config", str(tmp_path / "config.toml"), "config", "dump"]
    dump = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    runtimes = runtimes_of(dump)
    assert set(runtimes) == {HANDLER, "runc"}
    table = runtimes[HANDLER]
    assert isinstance(table, dict)
    assert table["runtime_type"] == "io.containerd.vmcell.v2"
    assert table["pod_annotations"] == list(POD_ANNOTATIONS)
    assert table["privileged_without_host_devices"] is True
