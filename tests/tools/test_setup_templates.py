"""The templates of a node: built, imported once, and what is said without a containerd."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_containerd import real_containerd

from vmcell_protos.errors import CallerError
from vmcell_tools import setup_templates
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.image_import import archive_digest
from vmcell_tools.oci_image import IMAGES, find_oci_image
from vmcell_tools.progress import Progress
from vmcell_tools.setup_templates import NAMESPACE, TEMPLATES, install_templates

QUIET = Progress("test", quiet=True)
# Busybox, so that the test takes seconds where nothing is built yet.
NAMES = ("small",)


def test_the_templates_are_images_of_ours() -> None:
    assert TEMPLATES == ("base", "code-interpreter-v1")
    assert set(TEMPLATES) < set(IMAGES)


def test_without_a_containerd_the_image_is_built_and_the_rest_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = BuildCache.default()
    with Progress("vmcell setup") as progress:
        (line,) = install_templates(NAMES, cache, progress, tmp_path / "none.sock")
    image = find_oci_image("small", cache, QUIET)
    assert image is not None
    assert f"{image.archive} is built and not imported" in line
    assert line.endswith("start it, then run: vmcell image import small")
    assert "vmcell setup: template small: looking for its image" in capsys.readouterr().err
    with pytest.raises(CallerError, match="there is no image 'large'"):
        install_templates(("large",), cache, QUIET, tmp_path / "none.sock")


@pytest.mark.root
def test_an_image_is_imported_where_noded_looks_and_only_once(tmp_path: Path) -> None:
    cache = BuildCache.default()
    with real_containerd(tmp_path / "containerd") as containerd:
        socket = Path(containerd.socket)
        reference = IMAGES["small"].reference
        assert install_templates(NAMES, cache, QUIET, socket) == [
            f"template small: imported {reference}"
        ]
        image = find_oci_image("small", cache, QUIET)
        assert image is not None
        (row,) = (
            line.split()
            for line in containerd.ctr("images", "list", namespace=NAMESPACE).splitlines()
            if line.startswith(reference)
        )
        assert row[2] == archive_digest(image.archive)
        assert install_templates(NAMES, cache, QUIET, socket) == []
        containerd.ctr("images", "rm", reference, namespace=NAMESPACE)
        assert len(install_templates(NAMES, cache, QUIET, socket)) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], TEMPLATES),
        (["--without-code-interpreter"], ("base",)),
        (["--without-templates"], ()),
        (["--without-templates", "--without-code-interpreter"], ()),
    ],
)
def test_the_flags_leave_templates_out(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: tuple[str, ...]
) -> None:
    """All else of setup is another test's: it would change this host."""
    from click.testing import CliRunner

    from vmcell_tools import containerd_setup, ingress_setup, setup_host
    from vmcell_tools.cli import main

    asked: list[tuple[str, ...]] = []

    def install(names: tuple[str, ...], cache: BuildCache, progress: Progress) -> list[str]:
        asked.append(names)
        return [f"template {name}" for name in names]

    monkeypatch.setattr(setup_templates, "install_templates", install)
    monkeypatch.setattr(setup_host, "install", lambda *_, **__: [])
    monkeypatch.setattr(ingress_setup, "install", lambda root: [])
    monkeypatch.setattr(containerd_setup, "advice", lambda root: "advice")
    words = ["setup", "--kernel", "/bin/true", "--base-image", "/bin/true", *flags]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert asked == [expected]
    told = [line for line in result.output.splitlines() if not line.startswith("vmcell setup:")]
    lines = [f"template {name}" for name in expected]
    assert told == [*(lines or ["nothing to do"]), "advice"]
