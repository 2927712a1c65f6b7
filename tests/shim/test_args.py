"""containerd's command line."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_shim.args import check_identity, parse_args

FLAGS = [
    ["-namespace", "default"],
    ["-address", "/run/containerd/containerd.sock"],
    ["-publish-binary", "/usr/bin/containerd"],
    ["-id", "c1"],
    ["-debug"],
]


def test_any_order_means_the_same() -> None:
    for order in itertools.permutations([*FLAGS, ["start"]]):
        invocation = parse_args([word for flag in order for word in flag])
        assert invocation.action == "start"
        assert (invocation.namespace, invocation.id) == ("default", "c1")
        assert invocation.address == "/run/containerd/containerd.sock"
        assert invocation.publish_binary == "/usr/bin/containerd"
        assert invocation.debug


def test_forms_of_go_flags() -> None:
    invocation = parse_args(["--id=c1", "-namespace=a=b", "-debug=false", "-bundle", "", "delete"])
    assert (invocation.id, invocation.namespace, invocation.bundle) == ("c1", "a=b", "")
    assert not invocation.debug
    assert parse_args(["-info"]).info
    assert parse_args(["-v"]).version
    assert parse_args(["--version"]).version


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-id"], "-id"),
        (["-colour", "red"], "-colour"),
        (["restart"], "restart"),
        (["start", "delete"], "delete"),
    ],
)
def test_wrong_lines_are_named(words: list[str], named: str) -> None:
    with pytest.raises(CallerError, match=named):
        parse_args(words)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a-", "a b", "é", "a" * 77])
def test_names_that_are_no_file_names(name: str) -> None:
    invocation = parse_args(["-namespace", "default", "start"])
    invocation.id = name
    with pytest.raises(CallerError, match="identifier"):
        check_identity(invocation)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_parses_or_refuses(words: list[str]) -> None:
    """Any argv gives an invocation or a CallerError, nothing else."""
    with suppress(CallerError):
        assert parse_args(words).action in ("", "start", "delete")
