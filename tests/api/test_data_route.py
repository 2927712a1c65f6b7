"""Whom a data-plane request reaches, for whatever a client may send."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmcell_api import data_route
from vmcell_api.data_route import (
    ENVD_PORT,
    Refusal,
    Request,
    Signed,
    Target,
    check_traffic_token,
    find_target,
    refusal_from_header,
    signing_token,
)
from vmcell_api.identifiers import SANDBOX_ID
from vmcell_api.signature_search import (
    MISSES_PER_CLIENT_S,
    MISSES_PER_S,
    MissLimit,
    SignatureSearch,
)

ID = "i" + "a1" * 9 + "z"
OTHER = "i" + "b2" * 9 + "z"
# What clients' heads are made of, valid and not.
PIECES = st.sampled_from(
    [
        *(ID, OTHER, ID.upper(), ID[:-1], "49983", "80", "0", "65536", "99999999999", "٣", "²"),
        *("-", ".", ":", "/", "//", "..", "@", "#", "?", "%", "%2e", "%2F", "%00", " ", "\t", "\\"),
        *(
            "sbx.example",
            "api",
            "localhost",
            "127.0.0.1",
            "[::1]",
            "init",
            "INIT",
            "files",
            "http://",
        ),
        *("signature=v1_x", "&path=/a", "&username=u", "\x00", "é", "\udc80", "xn--", "_"),
    ]
)
TEXT = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=40))


@given(
    method=st.sampled_from(["GET", "POST", "OPTIONS", "PRI", ""]),
    host=TEXT,
    uri=TEXT,
    id_header=TEXT,
    port_header=TEXT,
    domain=st.sampled_from(["", "sbx.example", "sbx.example:8443"]),
)
@example("GET", f"80-{ID}.sbx.example", "/", OTHER, "81", "sbx.example")
@example("GET", f"80-{ID}.evil", "/", OTHER, "81", "sbx.example")
@example("GET", "", "/", ID, "000000001999999", "")
@example("GET", "", "/", ID, "0" * 5000 + "80", "")
def test_a_target_was_named_by_the_client_and_is_one(
    method: str, host: str, uri: str, id_header: str, port_header: str, domain: str
) -> None:
    request = Request(
        method=method, host=host, uri=uri, id_header=id_header, port_header=port_header
    )
    found = find_target(request, domain)
    if isinstance(found, Target):
        assert SANDBOX_ID.fullmatch(found.sandbox_id)
        assert 0 < found.port < 65536
        in_host = host.lower().startswith(f"{found.port:d}-{found.sandbox_id}") or (
            f"-{found.sandbox_id}" in host.lower()
        )
        in_headers = found.sandbox_id in id_header.lower() and int(port_header) == found.port
        assert in_host or in_headers
        if domain and not in_headers:
            assert "sbx.example" in host.lower()
    elif isinstance(found, Refusal):
        assert found.status in (400, 404)
        header = found.as_header()
        assert header.isascii()
        assert header.isprintable()
        assert refusal_from_header(header) == found
    else:
        assert uri.partition("?")[0] == "/files"


@given(TEXT)
@example('{"status":200,"message":"","sandbox_id":"","port":0,"more":1}')
@example("[]")
@example("null")
@example('{"status":1}')
def test_no_header_breaks_the_refusal(text: str) -> None:
    found = refusal_from_header(text)
    assert found is None or isinstance(found, Refusal)


@given(given_token=TEXT, token=st.text("0123456789abcdef", max_size=64), port=st.integers(1, 65535))
def test_a_closed_port_opens_to_its_token_alone(given_token: str, token: str, port: int) -> None:
    target = Target(sandbox_id=ID, port=port)
    request = Request(method="GET", host="", uri="/", traffic_token=given_token)
    refusal = check_traffic_token(request, target, token)
    if not token or port == ENVD_PORT or given_token == token:
        assert refusal is None
    else:
        assert refusal is not None
        assert (refusal.status, refusal.port) == (403, port)
        assert not given_token or given_token not in refusal.as_header() or len(given_token) < 20


def test_a_host_of_the_domain_comes_before_headers() -> None:
    request = Request(
        method="GET", host=f"80-{ID}.sbx.example", uri="/", id_header=OTHER, port_header="81"
    )
    assert find_target(request, "sbx.example:8443") == Target(sandbox_id=ID, port=80)
    elsewhere = find_target(request, "box.example")
    assert elsewhere == Target(sandbox_id=OTHER, port=81)


@pytest.mark.parametrize("host", ["127.0.0.1:3080", "localhost", "sandbox.sbx.example", "[::1]:80"])
def test_plain_hosts_leave_it_to_the_headers(host: str) -> None:
    request = Request(method="GET", host=host, uri="/", id_header=ID, port_header="80")
    assert find_target(request, "sbx.example") == Target(sandbox_id=ID, port=80)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2), st.booleans())))
def test_misses_are_bounded_by_client_and_altogether(
    steps: list[tuple[str, int, bool]],
) -> None:
    now = [0.0]
    limit = MissLimit(lambda: now[0])
    counted: dict[tuple[int, str], int] = {}
    for client, pause_s, finds in steps:
        now[0] += pause_s
        second = int(now[0])
        if limit.take(client):
            if finds:
                limit.give_back(client)
            else:
                counted[second, client] = counted.get((second, client), 0) + 1
    assert all(count <= MISSES_PER_CLIENT_S for count in counted.values())


def test_many_addresses_do_not_add_up() -> None:
    limit = MissLimit(lambda: 5.0)
    taken = sum(limit.take(f"10.0.0.{number % 200}") for number in range(1000))
    assert taken == MISSES_PER_S


def _signed(token: str, path: str = "/a") -> Signed:
    import base64
    import hashlib

    digest = hashlib.sha256(f"{path}:read::{token}".encode()).digest()
    signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
    return Signed(path=path, operation="read", username="", expiration="", signature=signature)


def test_a_signature_is_searched_for_once() -> None:
    searches = []

    def tokens() -> dict[str, str]:
        searches.append(1)
        return {ID: "one", OTHER: "two"}

    search = SignatureSearch(tokens)
    for _ in range(100):
        assert search.find(_signed("two"), "1.2.3.4") == Target(sandbox_id=OTHER, port=ENVD_PORT)
    assert len(searches) == 1
    search.forget(_signed("two"))
    search.find(_signed("two"), "1.2.3.4")
    assert len(searches) == 2
    for _ in range(200):
        found = search.find(_signed("three"), "1.2.3.4")
        assert isinstance(found, Refusal)
    assert len(searches) <= 2 + 2 * MISSES_PER_CLIENT_S, "a second may have turned"


def test_what_a_search_costs() -> None:
    """A miss tries every token; the bound of misses a second keeps that under a tenth of a core."""
    tokens = {f"i{number:019d}": f"{number:064x}" for number in range(1000)}
    signed = _signed("none of them")
    begun = time.process_time()
    for _ in range(10):
        assert signing_token(signed, tokens) is None
    each_s = (time.process_time() - begun) / 10
    assert each_s * MISSES_PER_S < 1.0, f"{each_s * 1000:.1f} ms for 1000 tokens"


def test_the_right_signature_and_no_other() -> None:
    assert data_route.token_signs(_signed("one"), "one")
    assert not data_route.token_signs(_signed("one"), "two")
