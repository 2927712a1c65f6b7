"""A certificate authority of this host's own, and the wildcard certificate that nginx shows.

For development and tests, where no public authority signs: clients have to be told to trust it.
It is made with openssl, which Debian's ca-certificates brings along; a library would be one more
compiled dependency of the service for two calls at setup. The authority may sign for its domain
alone (RFC 5280 § 4.2.1.10), so whoever trusts it trusts it for nothing else, and its key stays in a
file of root's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError

CA_DAYS = 3650
# The longest that platforms take from a private authority.
SERVER_DAYS = 825
RENEW_WITHIN_S = 30 * 24 * 3600
OPENSSL_DEADLINE_S = 60
_LABEL = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_DOMAIN = re.compile(rf"(?P<name>{_LABEL}(\.{_LABEL})+)(:(?P<port>[0-9]{{1,5}}))?")
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files; `authority` is what clients trust."""

    authority: Path
    certificate: Path
    key: Path


def split_domain(domain: str) -> tuple[str, int]:
    """Host name and port (443) of `name[:port]`; CallerError for one no client would take."""
    match = _DOMAIN.fullmatch(domain)
    if match is None:
        raise CallerError(
            f"{domain!r} will not do as a domain: give two lower-case labels or more, like"
            " sbx.example or sbx.localhost:8443 (Python's SDK takes no wildcard above a single one)"
        )
    port = int(match["port"] or 443)
    if not 0 < port < 65536:
        raise CallerError(f"{domain!r} has port {port}; give 1 to 65535")
    return match["name"], port


def ensure_certificate(folder: Path, name: str) -> tuple[TlsFiles, list[str]]:
    """Files for `<name>` and `*.<name>` in `folder`, and one line for each that was made.

    What is there and still good for a month stays; another domain gets another authority. Raises
    HostError.
    """
    files = TlsFiles(
        authority=folder / "ca.pem", certificate=folder / "server.pem", key=folder / "server.key"
    )
    authority_key = folder / "ca.key"
    if not _is_good(files.authority, authority_key, f"DNS:{name}", None):
        _make(folder, [(files.authority, 0o644), (authority_key, 0o600)], _authority_words(name))
        made = [f"made the certificate authority {files.authority}"]
    else:
        made = []
    if made or not _is_good(files.certificate, files.key, f"DNS:*.{name}", files.authority):
        words = _server_words(name, files.authority, authority_key)
        _make(folder, [(files.certificate, 0o644), (files.key, 0o600)], words)
        made.append(f"made the certificate {files.certificate} for {name} and *.{name}")
    return files, made


def _authority_words(name: str) -> list[str]:
    return [
        *("-days", str(CA_DAYS), "-subj", f"/CN=vmcell authority for {name}"),
        *("-addext", "basicConstraints=critical,CA:TRUE,pathlen:0"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-addext", f"nameConstraints=critical,permitted;DNS:{name}"),
    ]


def _server_words(name: str, authority: Path, authority_key: Path) -> list[str]:
    return [
        *("-days", str(SERVER_DAYS), "-subj", "/CN=vmcell"),
        *("-CA", str(authority), "-CAkey", str(authority_key)),
        *("-addext", f"subjectAltName=DNS:{name},DNS:*.{name}"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
        *("-addext", "keyUsage=critical,digitalSignature"),
        *("-addext", "extendedKeyUsage=serverAuth"),
    ]


def _make(folder: Path, places: list[tuple[Path, int]], words: list[str]) -> None:
    """A fresh certificate and key; both are in their places, or the old ones stay."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
            fresh = [Path(name, path.name) for path, _ in places]
            # Without a configuration of the host's, which may add or forbid what is asked for here.
            config = Path(name, "openssl.cnf")
            config.write_text("[req]\ndistinguished_name = dn\n[dn]\n")
            out = ["-out", str(fresh[0]), "-keyout", str(fresh[1])]
            _openssl("req", "-x509", "-sha256", "-config", str(config), *_KEY, *out, *words)
            for (path, mode), made in zip(reversed(places), reversed(fresh), strict=True):
                made.chmod(mode)
                made.replace(path)
    except OSError as error:
        raise HostError(f"cannot write {folder}: {error.strerror}; run it as root") from error


def _is_good(certificate: Path, key: Path, mark: str, signer: Path | None) -> bool:
    """Whether both are there, belong together, carry `mark` and outlive the next month."""
    if not certificate.exists() or not key.exists():
        return False
    shown = _tried("x509", "-in", str(certificate), "-noout", "-text", "-pubkey")
    own = _tried("pkey", "-in", str(key), "-pubout")
    lasts = _tried("x509", "-in", str(certificate), "-noout", "-checkend", str(RENEW_WITHIN_S))
    if shown is None or own is None or lasts is None or own not in shown:
        return False
    if not re.search(rf"{re.escape(mark)}(?![\w.-])", shown):
        return False
    words = ["verify", "-CAfile", str(signer), str(certificate)]
    return signer is None or _tried(*words) is not None


def _openssl(*words: str) -> str:
    program = shutil.which("openssl")
    if program is None:
        raise HostError("openssl is not installed; install the package openssl")
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [program, *words],
            capture_output=True,
            text=True,
            timeout=OPENSSL_DEADLINE_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"openssl {words[0]} did not end in {OPENSSL_DEADLINE_S} s") from error
    if done.returncode:
        raise HostError(f"openssl {words[0]} failed: {' '.join(done.stderr.split())[:400]}")
    return done.stdout


def _tried(*words: str) -> str | None:
    """openssl's output; None when it says no."""
    try:
        return _openssl(*words)
    except HostError:
        return None
