"""`vmcell setup`, the E2B service's part: nginx's configuration, systemd's units, a local CA.

api.toml is the operator's: it is read, and changed only where `--tls-domain` asks for settings that
are not there yet. `root` is the root of the host's tree, another directory in tests; what is
written names paths without it.
"""

from __future__ import annotations

import sys
import tomllib
from contextlib import suppress
from pathlib import Path

from vmcell_api import nginx, nginx_files
from vmcell_api.config import DEFAULT_PATH, ApiConfig, parse_config
from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.local_ca import ensure_certificate, split_domain
from vmcell_tools.service_units import NGINX_PATH, SERVICE_PATH, nginx_unit, service_unit
from vmcell_tools.setup_host import below, remove_file, write_file

NGINX_CONFIG = "/etc/vmcell/nginx.conf"
TLS_FOLDER = "/etc/vmcell/tls"
RUN_FOLDER = "/run/"
# Where Debian's package puts it; written into the unit of a host that has no nginx yet.
NGINX_PROGRAM = "/usr/sbin/nginx"


def install(root: Path) -> list[str]:
    """Writes nginx.conf and the units for the settings in api.toml; a line per thing that changed.

    Raises HostError for settings that are wrong, and when this host's nginx refuses the text.
    """
    config = _present_config(root)
    if not config.nginx_dir.startswith(RUN_FOLDER):
        raise HostError(
            f"nginx_dir is {config.nginx_dir}; systemd makes it, so it has to stand below /run"
        )
    try:
        program = nginx_files.nginx_program()
        version = nginx_files.nginx_version(program)
    except HostError:
        program, version = "", nginx.NginxPlan.version
    text = nginx.render(nginx_files.plan_for(config, version))
    path = below(root, NGINX_CONFIG)
    unit = nginx_unit(program or NGINX_PROGRAM, config=NGINX_CONFIG, folder=config.nginx_dir)
    done = [
        write_file(path, text, 0o644),
        write_file(below(root, SERVICE_PATH), service_unit(sys.executable), 0o644),
        write_file(below(root, NGINX_PATH), unit, 0o644),
    ]
    return [line for line in done if line]


def uninstall(root: Path) -> list[str]:
    """Removes what `install` wrote; api.toml and the TLS files are the operator's to delete."""
    done = []
    for name in (NGINX_CONFIG, SERVICE_PATH, NGINX_PATH):
        path = below(root, name)
        if path.exists():
            remove_file(path)
            done.append(f"removed {path}")
    if below(root, TLS_FOLDER).exists():
        done.append(f"kept {below(root, TLS_FOLDER)}; delete it when no client trusts it any more")
    with suppress(OSError):  # what is left there is the operator's
        below(root, NGINX_CONFIG).parent.rmdir()
    return done


def set_up_tls(root: Path, domain: str) -> list[str]:
    """Makes the local authority and a certificate for `name[:port]` and puts them into api.toml.

    A line per thing that changed. Raises CallerError when api.toml says something else already.
    """
    name, port = split_domain(domain)
    settings = {
        "domain": domain,
        "tls_bind": f"127.0.0.1:{port}",
        "tls_certificate": f"{TLS_FOLDER}/server.pem",
        "tls_key": f"{TLS_FOLDER}/server.key",
    }
    changed = _add_settings(root, settings, free=("tls_bind",))
    _, done = ensure_certificate(below(root, TLS_FOLDER), name)
    return done + changed


def trust_advice(root: Path, domain: str) -> list[str]:
    """How clients of `domain` come to use it and to trust the authority."""
    name, _ = split_domain(domain)
    authority = below(root, f"{TLS_FOLDER}/ca.pem")
    lines = [
        f"clients need: export E2B_DOMAIN={domain}",
        f"  Python SDK: export SSL_CERT_FILE={authority}",
        f"  JavaScript SDK: export NODE_EXTRA_CA_CERTS={authority}",
        f"  browsers, curl: cp {authority} /usr/local/share/ca-certificates/vmcell.crt"
        " && update-ca-certificates",
    ]
    if name.endswith(".localhost"):
        lines.append(
            f"  names below {name}: the Python SDK finds them by itself; for others use a resolver"
            f" that answers *.localhost (systemd-resolved), or a wildcard entry in your DNS"
        )
    else:
        lines.append(f"  DNS: *.{name} has to lead to this host; set tls_bind for other hosts")
    return lines


def _add_settings(root: Path, settings: dict[str, str], *, free: tuple[str, ...]) -> list[str]:
    """Puts what api.toml does not say at its top; what it says differently is the operator's.

    `free`: keys that may differ.
    """
    path = below(root, DEFAULT_PATH)
    text = _text(path)
    present = tomllib.loads(text) if text else {}
    for key, value in settings.items():
        if key not in free and present.get(key, value) != value:
            raise CallerError(
                f"{path} sets {key} to {present[key]!r}, not to {value!r}; change it there, or"
                " leave --tls-domain out"
            )
    missing = [f'{key} = "{value}"\n' for key, value in settings.items() if key not in present]
    if not missing:
        return []
    text = "".join(missing) + text
    parse_config(text, str(path))
    return [write_file(path, text, 0o644)]


def _present_config(root: Path) -> ApiConfig:
    path = below(root, DEFAULT_PATH)
    return parse_config(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        tomllib.loads(text)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HostError(f"cannot read {path} ({error}); repair or delete it") from error
    return text
