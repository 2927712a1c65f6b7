"""`vmcell setup` below another root: what it writes, keeps, and takes away again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.config import parse_config
from vmcell_tools import setup_host
from vmcell_tools.containerd_config import SNIPPETS, merged
from vmcell_tools.setup_host import Artifacts, install, render_shim, uninstall

ARTIFACTS = Artifacts(kernel="/cache/vmlinux", base_image="/cache/base.erofs")
CONFIG = "etc/vmcell/config.toml"
UNIT = "etc/systemd/system/vmcell-zygote.service"
SHIM = "usr/local/bin/containerd-shim-vmcell-v2"
TEMPLATE = "#!/usr/bin/python3 -ISB\nSOURCE_ROOTS = ()\nprint(SOURCE_ROOTS)\n"


def test_setup_writes_what_the_shim_reads(tmp_path: Path) -> None:
    done = install(tmp_path, ARTIFACTS, vcpus=3, memory_mib=256)
    config = parse_config((tmp_path / CONFIG).read_text(), CONFIG)
    assert (config.kernel, config.base_image) == (ARTIFACTS.kernel, ARTIFACTS.base_image)
    assert (config.default_vcpus, config.default_memory_mib) == (3, 256)
    assert (tmp_path / SHIM).stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "run/vmcell").stat().st_mode & 0o777 == 0o700
    assert len(done) == 8
    for row in SNIPPETS:
        assert (tmp_path / "etc/vmcell/containerd" / row.file).read_text() == row.text
    assert not (tmp_path / "etc/containerd").exists()


def test_the_zygotes_unit_is_one_for_systemd(tmp_path: Path) -> None:
    """systemd's own check, of the unit as it stands but for the shim, which is not installed."""
    install(tmp_path, ARTIFACTS)
    text = (tmp_path / UNIT).read_text()
    assert "ExecStart=/usr/local/bin/containerd-shim-vmcell-v2 zygote\n" in text
    unit = tmp_path / "vmcell-zygote.service"
    unit.write_text(text.replace("/usr/local/bin/containerd-shim-vmcell-v2", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_second_setup_changes_nothing(tmp_path: Path) -> None:
    install(tmp_path, ARTIFACTS)
    assert install(tmp_path, ARTIFACTS) == []


def test_what_the_operator_changed_stays(tmp_path: Path) -> None:
    install(tmp_path, ARTIFACTS)
    path = tmp_path / CONFIG
    path.write_text(path.read_text().replace("writable_mib = 10240", "writable_mib = 77"))
    newer = Artifacts(kernel="/cache/newer", base_image=ARTIFACTS.base_image)
    assert install(tmp_path, newer) == [f"wrote {path}"]
    config = parse_config(path.read_text(), CONFIG)
    assert (config.writable_mib, config.kernel) == (77, "/cache/newer")


def test_a_broken_configuration_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.parent.mkdir(parents=True)
    path.write_text("colour = 'red'\n")
    with pytest.raises(HostError, match="colour"):
        install(tmp_path, ARTIFACTS)
    assert path.read_text() == "colour = 'red'\n"
    assert not (tmp_path / SHIM).exists()


def test_uninstall_takes_away_what_setup_wrote(tmp_path: Path) -> None:
    install(tmp_path, ARTIFACTS)
    done = uninstall(tmp_path)
    assert not (tmp_path / "etc/vmcell").exists()
    assert not (tmp_path / SHIM).exists()
    assert not (tmp_path / UNIT).exists()
    assert any("/var/lib/vmcell" in line for line in done)
    assert uninstall(tmp_path) == []


def test_uninstall_takes_the_runtime_out_of_containerds_configuration(tmp_path: Path) -> None:
    install(tmp_path, ARTIFACTS)
    path = tmp_path / "etc/containerd/config.toml"
    path.parent.mkdir()
    path.write_text(merged("version = 2\nroot = '/x'\n", SNIPPETS[0]))
    done = uninstall(tmp_path)
    assert path.read_text() == "version = 2\nroot = '/x'\n"
    assert any("restart containerd" in line for line in done)


def test_uninstall_keeps_what_an_operator_put_beside(tmp_path: Path) -> None:
    install(tmp_path, ARTIFACTS)
    mine = tmp_path / "etc/vmcell/containerd/mine.toml"
    mine.write_text("version = 2\n")
    uninstall(tmp_path)
    assert [path.name for path in mine.parent.iterdir()] == ["mine.toml"]


def test_uninstall_refuses_while_a_sandbox_lives(tmp_path: Path) -> None:
    install(tmp_path, ARTIFACTS)
    state = tmp_path / "run/vmcell/default/c1/state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    with pytest.raises(CallerError, match=r"\(c1 in namespace default\).*task rm -f ID"):
        uninstall(tmp_path)
    assert (tmp_path / SHIM).exists()
    assert (tmp_path / CONFIG).exists()


def test_a_file_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, ARTIFACTS)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(HostError, match=r"cannot remove .*: Permission denied; run it as root"):
        uninstall(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file where a directory should be")
    with pytest.raises(HostError, match=r"cannot .*etc/vmcell"):
        install(tmp_path, ARTIFACTS)


def test_the_rendered_shim_runs_this_interpreter_with_these_roots(tmp_path: Path) -> None:
    script = tmp_path / "shim"
    script.write_text(render_shim(TEMPLATE, interpreter=sys.executable, roots=("/a b", "/c'd")))
    script.chmod(0o755)
    shown = subprocess.check_output([script], text=True)
    assert shown.strip() == repr(("/a b", "/c'd"))


def test_the_projects_own_template_can_be_rendered() -> None:
    text = setup_host.shim_executable()
    assert text.startswith("#!/")
    assert text.splitlines()[0].endswith(" -ISB")
    compile(text, "shim", "exec")
    for folder in setup_host.SHIM_SOURCE_ROOTS:
        assert str(setup_host.CHECKOUT / folder) in text


@pytest.mark.parametrize("template", ["", "#!/x\nno roots\n", TEMPLATE + "SOURCE_ROOTS = ()\n"])
def test_another_template_is_refused(template: str) -> None:
    with pytest.raises(HostError, match="template"):
        render_shim(template or "x", interpreter="/usr/bin/python3", roots=())


@pytest.mark.parametrize("interpreter", ["/my python/bin/python3", "/" + "x" * 300])
def test_an_interpreter_that_the_kernel_could_not_start_is_refused(interpreter: str) -> None:
    with pytest.raises(HostError, match="#! line"):
        render_shim(TEMPLATE, interpreter=interpreter, roots=())
