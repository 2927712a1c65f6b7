"""Which packages are wanted, which are missing, and that no service starts while they install."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools import doctor, host_packages
from vmcell_tools.host_packages import PACKAGES, missing_packages, packages_for

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install-packages"


def test_each_package_once_in_order() -> None:
    names = packages_for(["build", "run"])
    assert len(names) == len(set(names))
    assert set(names) == {*PACKAGES["build"], *PACKAGES["run"]}
    assert names[0] == PACKAGES["build"][0]


def test_what_doctor_asks_for_is_among_the_packages_to_run_on(tmp_path: Path) -> None:
    """`vmcell setup --packages` and `install-packages run` leave doctor nothing to install."""
    rows = doctor.examine(doctor.Host(root=tmp_path, path=str(tmp_path)))
    advised = [re.search(r"apt-get install ([^;,]*)", row.advice) for row in rows]
    wanted = " ".join(match[1] for match in advised if match)
    # Of virtiofsd's package doctor names Debian 12's in brackets.
    names = re.sub(r"virtiofsd \(Debian 12: (\S+)\)", r"\1", wanted).split()
    assert len(names) >= 6
    assert set(names) <= set(PACKAGES["run"])


def test_an_unknown_purpose_is_named() -> None:
    with pytest.raises(CallerError, match="'games'"):
        packages_for(["games"])


def test_missing_is_what_dpkg_does_not_have() -> None:
    assert missing_packages(["dpkg", "no-such-package-1", "base-files"]) == ("no-such-package-1",)


def test_without_dpkg_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HostError, match="Debian 12"):
        missing_packages(["dpkg"])


def fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    program = folder / "apt-get"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(host_packages.os, "geteuid", lambda: 0)


def test_no_service_starts_and_the_policy_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(host_packages, "POLICY", policy)
    fake_apt(tmp_path / "bin", monkeypatch, f'{policy}; echo "$? $*" >>{tmp_path}/calls')
    host_packages.install(["dpkg"])
    update, install = (tmp_path / "calls").read_text().splitlines()
    assert update.startswith("101 ")
    assert update.endswith(" update")
    assert install.startswith("101 ")
    assert install.endswith(" install --yes --no-install-recommends dpkg")
    assert not policy.exists()


def test_a_policy_of_the_host_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 104\n")
    monkeypatch.setattr(host_packages, "POLICY", policy)
    fake_apt(tmp_path / "bin", monkeypatch, "true")
    host_packages.install(["dpkg"])
    assert policy.read_text() == "#!/bin/sh\nexit 104\n"


def test_a_failing_apt_is_told_in_its_words_and_leaves_no_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(host_packages, "POLICY", policy)
    fake_apt(tmp_path / "bin", monkeypatch, "echo 'E: no space' >&2; exit 100")
    with pytest.raises(HostError, match="apt-get update failed: E: no space"):
        host_packages.install(["dpkg"])
    assert not policy.exists()


def test_apt_that_installs_nothing_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_packages, "POLICY", tmp_path / "policy-rc.d")
    fake_apt(tmp_path / "bin", monkeypatch, "true")
    with pytest.raises(HostError, match="no-such-package-1"):
        host_packages.install(["no-such-package-1"])


def test_the_script_runs_on_the_standard_library_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "games"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("packages: no packages are listed for 'games'")


def test_maintainer_scripts_have_a_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dpkg closes the progress descriptor for them; it was descriptor 1 once, and echo failed."""
    monkeypatch.setattr(host_packages, "POLICY", tmp_path / "policy-rc.d")
    closes = r'case "$*" in *Status-Fd=1\ *) exec >&-;; esac'
    fake_apt(tmp_path / "bin", monkeypatch, f"{closes}; echo 'Setcap worked!' || exit 100")
    host_packages.install(["dpkg"])
