"""`vmcell setup`, the service's part: nginx.conf and units that the real programs take."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmcell_api.config import parse_config
from vmcell_api.nginx import NginxPlan, Tls, render
from vmcell_api.nginx_files import nginx_program
from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.ingress_setup import install, set_up_tls, trust_advice, uninstall

API = "etc/vmcell/api.toml"
NGINX = "etc/vmcell/nginx.conf"
UNITS = ("etc/systemd/system/vmcell.service", "etc/systemd/system/vmcell-nginx.service")


def _nginx_takes(root: Path) -> None:
    """nginx itself reads the file, with its places below `root` and a user that is there."""
    text = (root / NGINX).read_text()
    for place in ("/etc/vmcell/", "/run/vmcell/"):
        text = text.replace(place, f"{root}{place}")
    (root / "run/vmcell/nginx").mkdir(parents=True, exist_ok=True)
    tried = root / "tried.conf"
    tried.write_text(text.replace("user www-data;", ""))
    command = [nginx_program(), "-t", "-q", "-p", str(root), "-c", str(tried)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_setup_writes_is_what_the_programs_take(tmp_path: Path) -> None:
    assert len(install(tmp_path)) == 3
    assert not (tmp_path / API).exists(), "api.toml is the operator's"
    _nginx_takes(tmp_path)
    for name in UNITS:
        unit = tmp_path / Path(name).name
        unit.write_text((tmp_path / name).read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
        + [str(tmp_path / Path(name).name) for name in UNITS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert install(tmp_path) == []


def test_tls_is_put_into_api_toml_and_nginx(tmp_path: Path) -> None:
    (tmp_path / "etc/vmcell").mkdir(parents=True)
    (tmp_path / API).write_text("# mine\nworkers = 3\n")
    done = set_up_tls(tmp_path, "sbx.example:8443")
    assert len(done) == 3
    config = parse_config((tmp_path / API).read_text(), API)
    assert (config.domain, config.tls_bind) == ("sbx.example:8443", "127.0.0.1:8443")
    assert config.workers == 3
    assert "# mine" in (tmp_path / API).read_text()
    install(tmp_path)
    text = (tmp_path / NGINX).read_text()
    assert "server_name api.sbx.example;" in text
    assert "listen 127.0.0.1:8443 ssl http2" in text or "http2 on;" in text
    _nginx_takes(tmp_path)
    assert set_up_tls(tmp_path, "sbx.example:8443") == []
    advice = "\n".join(trust_advice(tmp_path, "sbx.example:8443"))
    for word in ("E2B_DOMAIN=sbx.example:8443", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "ca.pem"):
        assert word in advice


def test_another_listen_address_is_the_operators(tmp_path: Path) -> None:
    (tmp_path / "etc/vmcell").mkdir(parents=True)
    (tmp_path / API).write_text('tls_bind = "0.0.0.0:443"\n')
    set_up_tls(tmp_path, "sbx.example")
    assert parse_config((tmp_path / API).read_text(), API).tls_bind == "0.0.0.0:443"


def test_what_the_operator_set_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "etc/vmcell").mkdir(parents=True)
    (tmp_path / API).write_text('domain = "mine.example"\n')
    with pytest.raises(CallerError, match=r"mine\.example"):
        set_up_tls(tmp_path, "sbx.example")
    assert (tmp_path / API).read_text() == 'domain = "mine.example"\n'
    assert not (tmp_path / "etc/vmcell/tls").exists()


def test_settings_that_are_wrong_are_named(tmp_path: Path) -> None:
    (tmp_path / "etc/vmcell").mkdir(parents=True)
    for text, words in (
        ("domain = [", "api.toml"),
        ('nginx_dir = "/srv/x"', "below /run"),
        ('domain = "a b; }"', "domain"),
        ('data_bind = "1.2.3.4:80; #"', "data_bind"),
        ('tls_certificate = "/a"', "tls_key"),
        ('tls_certificate = "/a"\ntls_key = "/b"', "domain"),
    ):
        (tmp_path / API).write_text(text)
        with pytest.raises(HostError, match=words):
            install(tmp_path)
        assert not (tmp_path / NGINX).exists()


def test_uninstall_takes_away_what_setup_wrote(tmp_path: Path) -> None:
    set_up_tls(tmp_path, "sbx.example")
    install(tmp_path)
    done = uninstall(tmp_path)
    assert len(done) == 4
    assert not any((tmp_path / name).exists() for name in (NGINX, *UNITS))
    assert (tmp_path / "etc/vmcell/tls/ca.pem").exists()
    assert uninstall(tmp_path / "nothing") == []


def test_a_newer_nginx_is_told_of_http2_in_its_own_words() -> None:
    """By nginx's list of changes: from 1.25.1 on a directive, and the word of `listen` warns."""
    tls = Tls(listen="127.0.0.1:443", certificate="/c", key="/k")
    values = {"listen": "127.0.0.1:80", "route_socket": "/r", "folder": "/f", "tls": tls}
    older = render(NginxPlan(**values, version=(1, 25, 0)))  # type: ignore[arg-type]  # test values
    newer = render(NginxPlan(**values, version=(1, 26, 3)))  # type: ignore[arg-type]  # test values
    assert ("ssl http2" in older, "http2 on;" in older) == (True, False)
    assert ("ssl http2" in newer, "http2 on;" in newer) == (False, True)
