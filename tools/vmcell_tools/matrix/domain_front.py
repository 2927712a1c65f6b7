"""TLS and names for clients that know no URL of a service: `https://*.sbx.localhost:<port>`.

A throwaway authority signs one wildcard certificate; each connection is decrypted and handed on,
by the Host it names first, to the API or to the data plane. The clients' resolvers are told by
drivers/sitecustomize.py and drivers/wildcard_dns.cjs that the names mean this machine.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmcell_tools.build_step import run_step

DOMAIN = "sbx.localhost"
OPENSSL_WITHIN_S = 60.0
_MAX_HEAD_BYTES = 65536
_PIECE_BYTES = 65536
_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r\n]*)", re.IGNORECASE)

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class DomainFront:
    """`domain` is what clients are given, with the port; `authority` the file they must trust."""

    domain: str
    authority: Path


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """(authority, certificate, key) for the domain and all names one level below it."""
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key, request = folder / "server.pem", folder / "server.key", folder / "server.csr"
    names = folder / "names"
    names.write_text(f"subjectAltName=DNS:{DOMAIN},DNS:*.{DOMAIN}\n")
    for words in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=vmcell-matrix"
        f" -keyout {authority_key.name} -out {authority.name}",
        f"req -newkey rsa:2048 -nodes -subj /CN={DOMAIN} -keyout {key.name} -out {request.name}",
        f"x509 -req -in {request.name} -days 2 -CAcreateserial -CA {authority.name}"
        f" -CAkey {authority_key.name} -extfile {names.name} -out {certificate.name}",
    ):
        run_step(["openssl", *words.split()], deadline_s=OPENSSL_WITHIN_S, directory=folder)
    return authority, certificate, key


@contextmanager
def domain_front(folder: Path, api: Address, data_plane: Address) -> Iterator[DomainFront]:
    """A front on a free loopback port, its files in `folder`; connections end with it."""
    authority, certificate, key = make_certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(
            target=_accept, args=(listener, context, api, data_plane), daemon=True
        )
        thread.start()
        try:
            yield DomainFront(domain=f"{DOMAIN}:{port}", authority=authority)
        finally:
            # Closing alone does not wake accept(2).
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def _accept(
    listener: socket.socket, context: ssl.SSLContext, api: Address, data_plane: Address
) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(
            target=_serve, args=(connection, context, api, data_plane), daemon=True
        ).start()


def _serve(
    connection: socket.socket, context: ssl.SSLContext, api: Address, data_plane: Address
) -> None:
    """Hands one connection on; a client that hangs up or speaks no TLS is its own affair."""
    with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as client:
        head = _read_head(client)
        host = _HOST.search(head)
        if host is None:
            return
        address = api if host[1].startswith(b"api.") else data_plane
        with socket.create_connection(address) as server:
            server.sendall(head)
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _read_head(client: ssl.SSLSocket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD_BYTES:
        piece = client.recv(_PIECE_BYTES)
        if not piece:
            break
        head += piece
    return head


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Until `source` ends; then both are over, as HTTP/1.1 has no use for half a connection."""
    with suppress(OSError):
        while piece := source.recv(_PIECE_BYTES):
            target.sendall(piece)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
