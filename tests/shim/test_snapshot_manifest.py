"""manifest.json: one document for each manifest, and nothing else is one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_shim.snapshot_manifest import DISK, MEMORY, STATE, Manifest, SavedFile, check_id, parse
from vmcell_shim.snapshot_manifest import render as rendered

TEXT = st.text(max_size=256)
NUMBER = st.integers(0, (1 << 63) - 1)
SAVED = st.builds(SavedFile, bytes=NUMBER, allocated_bytes=NUMBER, digest=TEXT)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    disk, memory_mib = draw(st.booleans()), draw(st.integers(0, (1 << 42) - 1))
    files = {name: draw(SAVED) for name in (STATE, MEMORY, *([DISK] if disk else []))}
    files[MEMORY] = replace(files[MEMORY], bytes=memory_mib << 20)
    return Manifest(
        created_unix_ns=draw(NUMBER),
        container_id=draw(TEXT),
        vcpus=draw(NUMBER),
        memory_mib=memory_mib,
        kernel=draw(TEXT),
        base_image=draw(TEXT),
        images=tuple(draw(st.lists(TEXT, max_size=8))),
        disk=disk,
        macs=tuple(draw(st.lists(TEXT, max_size=4))),
        terminal=draw(st.booleans()),
        parent=draw(TEXT),
        files=files,
    )


GOOD = Manifest(
    created_unix_ns=1_700_000_000_000_000_000,
    container_id="c1",
    vcpus=2,
    memory_mib=512,
    kernel="blake2b:aa",
    base_image="blake2b:bb",
    images=("blake2b:cc", "blake2b:dd"),
    disk=True,
    macs=("02:00:00:00:00:01",),
    terminal=False,
    parent="before",
    files={
        STATE: SavedFile(bytes=100, allocated_bytes=4096, digest="blake2b:01"),
        MEMORY: SavedFile(bytes=512 << 20, allocated_bytes=8192, digest="blake2b:02"),
        DISK: SavedFile(bytes=64 << 20, allocated_bytes=4096, digest="blake2b:03"),
    },
)


@given(manifests())
def test_what_is_rendered_is_parsed(manifest: Manifest) -> None:
    assert parse(rendered(manifest), "s") == manifest


def refused(document: bytes, word: str = "is damaged", code: str = "data_loss") -> None:
    with pytest.raises(CallerError, match=word) as caught:
        parse(document, "s1")
    assert caught.value.code == code
    assert str(caught.value).startswith("manifest.json of snapshot s1 ")


def test_every_bit_of_it_counts() -> None:
    """A format that this version cannot read is told apart from damage where it says so whole."""
    document = rendered(GOOD)
    codes = []
    for at in range(len(document)):
        for bit in range(8):
            bad = bytearray(document)
            bad[at] ^= 1 << bit
            with pytest.raises(CallerError, match=r"^manifest\.json of snapshot s1 ") as caught:
                parse(bytes(bad), "s1")
            codes.append(caught.value.code)
    assert set(codes) == {"data_loss", "failed_precondition"}
    assert codes.count("failed_precondition") <= 8


def test_every_cut_of_it_is_refused() -> None:
    document = rendered(GOOD)
    for length in range(len(document)):
        refused(document[:length])


@given(st.binary(max_size=200))
def test_noise(document: bytes) -> None:
    refused(document)


def trees() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )


def sealed(tree: dict[str, Any]) -> bytes:
    """With the digest that belongs to it: whoever can write one can write any."""
    tree.pop("digest", None)
    digest = hashlib.blake2b(json.dumps(tree).encode(), digest_size=32).hexdigest()
    return json.dumps({**tree, "digest": f"blake2b:{digest}"}, indent=1).encode() + b"\n"


def paths(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, dict):
        return [at]
    below = [path for key, value in tree.items() for path in paths(value, (*at, key))]
    return [at, *below] if at else below


PATHS = [path for path in paths(json.loads(rendered(GOOD))) if path != ("digest",)]


@given(st.sampled_from(PATHS), trees())
@settings(max_examples=500)
def test_any_value_of_another_kind(path: tuple[str, ...], value: Any) -> None:
    """By somebody who knows how digests are made: either a manifest comes out, or a sentence."""
    tree = json.loads(rendered(GOOD))
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    refusals = []
    try:
        assert rendered(parse(sealed(tree), "s1")) == sealed(tree)
    except CallerError as error:
        refusals.append(error)
    codes = {"data_loss", "failed_precondition"} if path == ("format",) else {"data_loss"}
    assert {error.code for error in refusals} <= codes


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_any_key_that_is_missing(path: tuple[str, ...]) -> None:
    tree = json.loads(rendered(GOOD))
    place = tree
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    refused(sealed(tree))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"policy": "none"}, "unknown key 'policy'"),
    "a negative number": ({"vcpus": -1}, "not the number"),
    "a fraction": ({"vcpus": 1.0}, "not the number"),
    "a boolean for a number": ({"vcpus": True}, "not the number"),
    "a number too large": ({"memory_mib": 1 << 63}, "not the number"),
    "a number for a boolean": ({"terminal": 0}, "neither true nor false"),
    "a text too long": ({"container_id": "x" * 257}, "not the text"),
    "a text for a list": ({"images": "blake2b:cc"}, "list"),
    "a list too long": ({"macs": ["x"] * 65}, "list"),
    "another memory": ({"memory_mib": 511}, "memory has not the length"),
    "no disk, but its file": ({"disk": False}, "it names the files"),
    "no files": ({"files": {}}, "it names the files"),
    "a file of another name": ({"files": {"../../etc/passwd": {}}}, "is damaged"),
    "a format that is no number": ({"format": "1"}, "format is no number"),
    "a format that is true": ({"format": True}, "format is no number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(name: str) -> None:
    changes, word = WRONG[name]
    refused(sealed({**json.loads(rendered(GOOD)), **changes}), word)


@pytest.mark.parametrize("version", [-1, 0, 2, 3, 1000])
def test_another_format(version: int) -> None:
    tree = {**json.loads(rendered(GOOD)), "format": version}
    refused(sealed(tree), f"has format {version}.*reads 1: make it again", "failed_precondition")


DOCUMENTS = (
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"1",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    b" " * ((1 << 20) + 1),
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_no_manifest_at_all(document: bytes) -> None:
    refused(document, "delete the snapshot")


def test_the_same_in_another_form() -> None:
    """Not a byte may differ: keys in another order, no indent, a key twice."""
    tree = json.loads(rendered(GOOD))
    refused(json.dumps(tree).encode())
    refused(json.dumps(dict(reversed(tree.items())), indent=1).encode() + b"\n")
    refused(rendered(GOOD).replace(b'{\n "format": 1', b'{\n "format": 1,\n "format": 1', 1))
    refused(rendered(GOOD) + b"\n")


@pytest.mark.parametrize("snapshot_id", ["a", "0", "a-b-0", "x" * 64, "0" * 64])
def test_ids(snapshot_id: str) -> None:
    check_id(snapshot_id)


BAD_IDS = (
    "",
    "-a",
    "A",
    "a_b",
    "a.b",
    "a/b",
    "..",
    ".",
    "a b",
    "a\n",
    "\0",
    "é",
    "x" * 65,
    "a" * 9999,
)


@pytest.mark.parametrize("snapshot_id", BAD_IDS)
def test_what_is_no_id(snapshot_id: str) -> None:
    with pytest.raises(CallerError, match="is no snapshot's id") as caught:
        check_id(snapshot_id)
    assert len(str(caught.value)) < 300
