"""Parsers that meet strangers' bytes: bodies, list queries, routing, image JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_api.config import ApiConfig, parse_config
from vmcell_api.data_route import Refusal, Request, Signed, Target, find_target
from vmcell_api.identifiers import SANDBOX_ID, new_sandbox_id, sandbox_id_of
from vmcell_api.json_body import MAX_BODY_BYTES, parse_json, read_json
from vmcell_api.node import oci_image
from vmcell_api.node.oci_spec import SandboxMachine, build_spec
from vmcell_api.node.slot_plan import slot_at
from vmcell_api.page_cursor import encode_cursor
from vmcell_api.sandbox_bodies import (
    CreateBody,
    parse_create,
    parse_list_query,
    parse_metadata_query,
)
from vmcell_protos.errors import CallerError, HostError

FAST = settings(max_examples=150, deadline=None)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
CREATE_FIELDS = st.sampled_from(
    ["templateID", "timeout", "metadata", "envVars", "network", "autoPause", "lifecycle", "secure"]
)


def _attempt(call: Callable[[], object]) -> tuple[CallerError | None, object]:
    """The refusal, or None and what `call` answered."""
    try:
        return None, call()
    except CallerError as error:
        return error, None


@FAST
@given(st.dictionaries(TEXT.filter(bool), TEXT, max_size=5))
def test_metadata_survives_the_sdks_encoding(metadata: dict[str, str]) -> None:
    """SDKs quote keys and values, then the form, then the query."""
    form = urlencode({quote(key): quote(value) for key, value in metadata.items()})
    query = urlencode({"metadata": form, "limit": "5"})
    assert parse_list_query(query).metadata == metadata


@FAST
@given(st.text(max_size=60))
def test_any_query_is_parsed_or_refused(text: str) -> None:
    parse_metadata_query(text)
    refusal, _ = _attempt(lambda: parse_list_query(text))
    assert refusal is None or refusal.code == "invalid_argument"


@FAST
@given(st.integers(0, 10**14))
def test_a_cursor_comes_back(started_at_unix_ms: int) -> None:
    sandbox_id = new_sandbox_id()
    query = urlencode({"nextToken": encode_cursor(started_at_unix_ms, sandbox_id)})
    assert parse_list_query(query).after == (started_at_unix_ms, sandbox_id)


@FAST
@given(st.dictionaries(CREATE_FIELDS, JSON, max_size=8))
def test_any_create_body_is_taken_or_refused(body: dict[str, object]) -> None:
    refusal, parsed = _attempt(lambda: parse_create(body, version=2, max_timeout_s=100))
    if refusal is not None:
        assert refusal.code == "invalid_argument"
        assert len(str(refusal)) < 500
    else:
        assert isinstance(parsed, CreateBody)
        assert parsed.template
        assert 1 <= parsed.timeout_s <= 100
        assert all(isinstance(value, str) for value in parsed.metadata.values())


@FAST
@given(st.binary(max_size=80))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    refusal, parsed = _attempt(lambda: parse_json(data))
    assert isinstance(parsed, dict) or (refusal and refusal.code == "invalid_argument")


@FAST
@given(st.dictionaries(TEXT, JSON, max_size=5))
def test_objects_come_through_unchanged(body: dict[str, object]) -> None:
    text = json.dumps(body)
    if "\\u0000" in text:
        with pytest.raises(CallerError, match="NUL"):
            parse_json(text.encode())
    else:
        assert parse_json(text.encode()) == body


def test_a_body_that_never_ends_is_read_only_so_far() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1, /) -> bytes:
            self.taken += size
            return b" " * size

    stream = Endless()
    with pytest.raises(CallerError, match="more than"):
        read_json(stream, None)
    assert stream.taken == MAX_BODY_BYTES + 1


SOME_ID = "i" + "b2" * 9 + "c"
HOSTS = [
    (f"8080-{SOME_ID}.sbx.example", Target(sandbox_id=SOME_ID, port=8080)),
    (f"8080-{SOME_ID.upper()}.SBX.example:443", Target(sandbox_id=SOME_ID, port=8080)),
    (f"8080-{SOME_ID}-client.sbx.example.", Target(sandbox_id=SOME_ID, port=8080)),
]


@pytest.mark.parametrize(("host", "target"), HOSTS)
def test_hosts(host: str, target: Target) -> None:
    request = Request(method="GET", host=host, uri="/")
    assert find_target(request, "") == target
    assert find_target(request, "sbx.example") == target
    assert find_target(request, "SBX.example:8443") == target, "SDKs are told the port with it"
    refused = find_target(request, "other.example")
    assert isinstance(refused, Refusal)
    assert refused.status == 400


@FAST
@given(st.text(max_size=50), st.text(max_size=50), st.text(max_size=25), st.text(max_size=8))
def test_any_request_has_a_target_or_a_refusal(
    host: str, uri: str, id_header: str, port_header: str
) -> None:
    request = Request(
        method="GET", host=host, uri=uri, id_header=id_header, port_header=port_header
    )
    found = find_target(request, "")
    if isinstance(found, Target):
        assert SANDBOX_ID.fullmatch(found.sandbox_id)
        assert 0 < found.port < 65536
    elif isinstance(found, Refusal):
        assert 400 <= found.status < 500
    else:
        assert isinstance(found, Signed)


@FAST
@given(st.text(max_size=60))
def test_an_id_is_valid_or_none(text: str) -> None:
    found = sandbox_id_of(text)
    assert found is None or SANDBOX_ID.fullmatch(found)


def test_chain_ids_are_containerds() -> None:
    """The rule of OCI image-spec, computed by hand for two and three layers."""
    import hashlib

    first, second, third = ("sha256:" + letter * 64 for letter in "abc")
    two = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    three = "sha256:" + hashlib.sha256(f"{two} {third}".encode()).hexdigest()
    assert oci_image.chain_id([first]) == first
    assert oci_image.chain_id([first, second]) == two
    assert oci_image.chain_id([first, second, third]) == three


@FAST
@given(JSON)
def test_any_image_json_is_read_or_refused(value: object) -> None:
    data = json.dumps(value).encode()
    for parse in (oci_image.parse_config, oci_image.config_digest, oci_image.manifest_digest):
        with pytest.raises(CallerError, match="image x") as caught:
            parse(data, "x")
        assert caught.value.code == "failed_precondition"


def test_an_index_without_our_platform() -> None:
    digest = "sha256:" + "0" * 64
    entry = {"digest": digest, "platform": {"os": "linux", "architecture": "arm64"}}
    with pytest.raises(CallerError, match="amd64"):
        oci_image.manifest_digest(json.dumps({"manifests": [entry]}).encode(), "x")
    entry["platform"] = {"os": "linux", "architecture": "amd64"}
    assert oci_image.manifest_digest(json.dumps({"manifests": [entry]}).encode(), "x") == digest


def test_slots_do_not_overlap() -> None:
    slots = [slot_at("10.88.0.0/16", number) for number in range(1, 300)]
    addresses = [a for slot in slots for a in (slot.host_address, slot.guest_address)]
    assert len(set(addresses)) == 2 * len(slots)
    assert len({slot.guest_mac for slot in slots} | {slot.host_mac for slot in slots}) == 598
    assert slots[0].guest_address == "10.88.0.3"
    assert max(len(slot.tap) for slot in slots) < 16


def test_a_spec_always_has_a_path() -> None:
    machine = SandboxMachine(
        sandbox_id=SOME_ID,
        namespace="vmcell",
        vcpus=1,
        memory_mib=64,
        tap="vmc1",
        mac="02:fc:0a:58:00:03",
        address="10.88.0.3",
        gateway="10.88.0.2",
    )
    spec = json.loads(build_spec(machine))
    assert any(row.startswith("PATH=") for row in spec["process"]["env"])
    assert "network" not in [row["type"] for row in spec["linux"]["namespaces"]]
    assert not any("secret" in key for key in spec["annotations"])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nonsense = 1", "nonsense"),
        ("slot_count = 0", "slot_count"),
        ('slot_count = "4"', "slot_count"),
        ("slot_count = true", "slot_count"),
        ('api_bind = "here"', "api_bind"),
        ('slot_network = "10.88.0.0/30"', "too small"),
        ('slot_network = "10.88.0.1/16"', "slot_network"),
        ('nameservers = ["dns.example"]', "nameservers"),
        ('workers = "x"', "workers is 'x'; it takes a whole number"),
        ("pool = 1", "pool is 1; it takes a list of texts"),
        ("allow_no_end = 1", "allow_no_end is 1; it takes true or false"),
        ("domain = 1", "domain is 1; it takes a text"),
        ('pool = ["x"]', "pool has 'x'"),
        ("= 1", "TOML"),
    ],
)
def test_bad_settings_are_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(HostError, match=word) as caught:
        parse_config(text, "api.toml")
    assert str(caught.value).startswith("api.toml")


def test_settings_are_read() -> None:
    config = parse_config('nameservers = ["9.9.9.9"]\nslot_count = 4\n', "api.toml")
    assert config == ApiConfig(nameservers=("9.9.9.9",), slot_count=4)
