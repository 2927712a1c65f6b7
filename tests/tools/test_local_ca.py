"""The local certificate authority: what it signs, what it keeps, what it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools import local_ca
from vmcell_tools.local_ca import ensure_certificate, split_domain


def _text(path: Path) -> str:
    command = ["openssl", "x509", "-in", str(path), "-noout", "-text"]
    return subprocess.check_output(command, text=True, timeout=60)


def test_what_it_makes(tmp_path: Path) -> None:
    files, made = ensure_certificate(tmp_path / "tls", "sbx.example")
    assert len(made) == 2
    shown = _text(files.certificate)
    assert "DNS:sbx.example, DNS:*.sbx.example" in shown
    assert "CA:FALSE" in shown
    authority = _text(files.authority)
    assert "Name Constraints: critical" in authority
    assert "DNS:sbx.example" in authority
    for path in (files.key, tmp_path / "tls/ca.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in (tmp_path / "tls").iterdir()) == [
        *("ca.key", "ca.pem", "server.key", "server.pem"),
    ]


def test_the_authority_signs_for_its_domain_alone(tmp_path: Path) -> None:
    files, _ = ensure_certificate(tmp_path, "sbx.example")
    words = local_ca._server_words("bank.example", files.authority, tmp_path / "ca.key")
    stolen = tmp_path / "stolen.pem"
    local_ca._make(tmp_path, [(stolen, 0o644), (tmp_path / "stolen.key", 0o600)], words)
    for path, good in ((files.certificate, True), (stolen, False)):
        command = ["openssl", "verify", "-CAfile", str(files.authority), str(path)]
        assert (subprocess.run(command, capture_output=True, check=False).returncode == 0) is good


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    files, _ = ensure_certificate(tmp_path, "sbx.example")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert ensure_certificate(tmp_path, "sbx.example") == (files, [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_lost_or_old_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = ensure_certificate(tmp_path, "sbx.example")
    authority = files.authority.read_bytes()
    files.key.unlink()
    assert len(ensure_certificate(tmp_path, "sbx.example")[1]) == 1
    files.certificate.write_text("rubbish")
    assert len(ensure_certificate(tmp_path, "sbx.example")[1]) == 1
    monkeypatch.setattr(local_ca, "RENEW_WITHIN_S", local_ca.SERVER_DAYS * 24 * 3600 + 60)
    assert len(ensure_certificate(tmp_path, "sbx.example")[1]) == 1
    assert files.authority.read_bytes() == authority, "clients trust it already"


def test_another_domain_gets_another_authority(tmp_path: Path) -> None:
    files, _ = ensure_certificate(tmp_path, "sbx.example")
    before = files.authority.read_bytes()
    assert len(ensure_certificate(tmp_path, "box.example")[1]) == 2
    assert files.authority.read_bytes() != before
    assert len(ensure_certificate(tmp_path, "ox.example")[1]) == 2, "no part of a name will do"


@pytest.mark.parametrize(
    ("domain", "expected"),
    [("sbx.localhost:8443", ("sbx.localhost", 8443)), ("a.b.c", ("a.b.c", 443))],
)
def test_domains(domain: str, expected: tuple[str, int]) -> None:
    assert split_domain(domain) == expected


@pytest.mark.parametrize(
    "domain",
    ["localhost", "", "*.a.b", "a.b:0", "a.b:65536", "A.b", "a..b", "a.b/", "a.b\n", "-a.b"],
)
def test_domains_that_will_not_do(domain: str) -> None:
    with pytest.raises(CallerError, match=r"port|domain"):
        split_domain(domain)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="file"):
        ensure_certificate(tmp_path / "file" / "tls", "sbx.example")


def test_openssl_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="install the package openssl"):
        ensure_certificate(tmp_path, "sbx.example")
