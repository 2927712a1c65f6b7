"""OCI specs: what becomes of them, and what is refused by which name."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_shim.oci_json import LIMIT_BYTES, parse_object
from vmcell_shim.sizing import OVERHEAD_MIB
from vmcell_shim.spec import GuestPlan, plan_guest

NETWORK = {
    "io.vmcell.net.tap": "vc3",
    "io.vmcell.net.mac": "02:00:00:00:00:03",
    "io.vmcell.net.address": "10.88.0.3/31",
    "io.vmcell.net.gateway": "10.88.0.2",
    "io.vmcell.net.nameservers": "10.88.0.2,1.1.1.1",
}


def spec(**changes: Any) -> dict[str, Any]:
    """What `ctr run` writes, in short."""
    whole: dict[str, Any] = {
        "ociVersion": "1.0.2-dev",
        "process": {"args": ["sh"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": []}],
        "linux": {
            "cgroupsPath": "/default/c1",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
        },
        "annotations": {"org.example": "kept on the host"},
    }
    whole.update(changes)
    return whole


def plan(**changes: Any) -> GuestPlan:
    return plan_guest(spec(**changes), default_vcpus=1, default_memory_mib=512)


def limits(**resources: Any) -> dict[str, Any]:
    return {"namespaces": [{"type": "network"}], "resources": resources}


@pytest.mark.parametrize("init", ["envd", "envd-builder"])
def test_the_guests_own_inits_reach_the_agent(init: str) -> None:
    assert plan(annotations={"io.vmcell.init": init}).init == init


def test_plain_spec() -> None:
    made = plan()
    assert (made.size.vcpus, made.size.memory_mib) == (1, 512)
    assert (made.hostname, made.init, made.network.namespace) == ("box", "", "")
    guest = made.guest_spec
    assert guest["process"] == {"args": ["sh"], "cwd": "/"}
    assert "annotations" not in guest
    kinds = [row["type"] for row in guest["linux"]["namespaces"]]
    assert kinds == ["pid", "ipc", "uts", "mount"]


def test_sizes_from_annotations_go_before_limits() -> None:
    made = plan(
        annotations={"io.vmcell.vcpus": "3", "io.vmcell.memory-mib": "1024"},
        linux=limits(cpu={"quota": 150_000, "period": 100_000}, memory={"limit": 64 << 20}),
    )
    assert (made.size.vcpus, made.size.memory_mib) == (3, 1024)


def test_sizes_from_limits_are_rounded_up() -> None:
    made = plan(
        linux=limits(cpu={"quota": 150_000, "period": 100_000}, memory={"limit": (64 << 20) + 1})
    )
    assert (made.size.vcpus, made.size.memory_mib) == (2, 65 + OVERHEAD_MIB)


@pytest.mark.parametrize("unlimited", [-1, 0, 9223372036854771712])
def test_no_limit_is_the_default(unlimited: int) -> None:
    made = plan(linux=limits(cpu={"quota": -1}, memory={"limit": unlimited}))
    assert (made.size.vcpus, made.size.memory_mib) == (1, 512)


REFUSED = {
    "0 vCPUs; a microVM has 1 to 8": {"annotations": {"io.vmcell.vcpus": "0"}},
    "99 vCPUs; a microVM has 1 to 8": {"annotations": {"io.vmcell.vcpus": "99"}},
    "'two'": {"annotations": {"io.vmcell.vcpus": "two"}},
    "1 MiB of memory; a microVM has 64 to 262144 MiB": {
        "annotations": {"io.vmcell.memory-mib": "1"}
    },
    "1048576 bytes of memory": {"linux": limits(memory={"limit": 1 << 20})},
    "asks for 99 vCPUs": {"linux": limits(cpu={"quota": 9_900_000, "period": 100_000})},
    "io.vmcell.kernel": {"annotations": {"io.vmcell.kernel": "/etc/shadow"}},
    "it takes envd or envd-builder": {"annotations": {"io.vmcell.init": "/bin/sh"}},
    "without io.vmcell.net.mac": {
        "annotations": {k: v for k, v in NETWORK.items() if not k.endswith("mac")}
    },
    "interface's name": {"annotations": {**NETWORK, "io.vmcell.net.tap": "../eth0"}},
    "no IP address": {"annotations": {**NETWORK, "io.vmcell.net.gateway": "gw.example"}},
    "10.88.0.3/33": {"annotations": {**NETWORK, "io.vmcell.net.address": "10.88.0.3/33"}},
    "10.88.0.3/²": {"annotations": {**NETWORK, "io.vmcell.net.address": "10.88.0.3/²"}},
    "unicast MAC": {"annotations": {**NETWORK, "io.vmcell.net.mac": "01:00:00:00:00:03"}},
    "hooks.createContainer": {"hooks": {"createContainer": [{"path": "/bin/true"}]}},
    "no network namespace": {"linux": {"namespaces": [{"type": "pid"}]}},
    "/proc/1/ns/net": {"linux": {"namespaces": [{"type": "network", "path": "/proc/1/ns/net"}]}},
    "pid namespace /proc/1/ns/pid": {
        "linux": {"namespaces": [{"type": "network"}, {"type": "pid", "path": "/proc/1/ns/pid"}]}
    },
    "type 'nfs'": {"mounts": [{"destination": "/x", "type": "nfs", "source": "host:/"}]},
    "plain path": {"mounts": [{"destination": "/x/../..", "type": "tmpfs"}]},
    "cannot read /no/such/file": {
        "mounts": [{"destination": "/x", "type": "bind", "source": "/no/such/file"}]
    },
    "has no process": {"process": None},
    "has no linux section": {"linux": None},
    "mounts is 'none'; it must be a list": {"mounts": "none"},
    "linux.resources.cpu.quota is 'much'": {"linux": limits(cpu={"quota": "much"})},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refusals_name_what_is_wrong(sentence: str) -> None:
    with pytest.raises(CallerError) as caught:
        plan(**REFUSED[sentence])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_network_annotations() -> None:
    linux = {"namespaces": [{"type": "network", "path": "/var/run/netns/x"}]}
    made = plan(annotations=NETWORK, linux=linux)
    assert made.network.tap is not None
    assert (made.network.tap.tap, made.network.tap.address) == ("vc3", "10.88.0.3/31")
    resolv = made.files[-1]
    assert resolv.destination == "/etc/resolv.conf"
    assert resolv.content == b"nameserver 10.88.0.2\nnameserver 1.1.1.1\n"


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["rbind", *options],
    }


def test_small_files_are_copied(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    hosts.chmod(0o640)
    made = plan(mounts=[bind(hosts, "/etc/hosts", "ro")])
    (copy,) = made.files
    assert (copy.destination, copy.content) == ("/etc/hosts", b"127.0.0.1 localhost\n")
    assert (copy.mode, copy.uid, copy.read_only) == (0o640, os.getuid(), True)
    assert made.guest_spec["mounts"] == []


def test_secret_trees_are_copied_parents_first(tmp_path: Path) -> None:
    """The layout of a Kubernetes secret: names are links into a dated directory."""
    secret = tmp_path / "secret"
    (secret / "..2026").mkdir(parents=True)
    (secret / "..2026" / "token").write_text("t0")
    (secret / "..data").symlink_to("..2026")
    (secret / "token").symlink_to("..data/token")
    copies = plan(mounts=[bind(secret, "/run/secret", "ro")]).files
    by_name = {copy.destination: copy for copy in copies}
    assert by_name["/run/secret/token"].content == b"t0"
    assert by_name["/run/secret/..data/token"].content == b"t0"
    assert copies[0].destination == copies[-1].destination == "/run/secret"
    assert [copy.read_only for copy in copies].index(True) == len(copies) - 1
    seen: set[str] = set()
    for copy in copies[:-1]:
        assert copy.destination == "/run/secret" or os.path.dirname(copy.destination) in seen
        seen.add(copy.destination)


def test_what_is_written_or_large_is_shared(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes((1 << 20) + 1))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "out").symlink_to("/etc/passwd")
    mounts = [
        bind(big, "/big"),
        bind(tmp_path, "/data", "rw"),
        bind(tmp_path, "/large", "ro"),
        bind(tree, "/tree", "ro"),
    ]
    made = plan(mounts=mounts)
    assert made.copies == made.files == ()
    shared = [(live.share.source, live.share.read_only) for live in made.shares]
    assert shared == [
        (str(big), False),
        (str(tmp_path), False),
        (str(tmp_path), True),
        (str(tree), True),
    ]
    assert [row["type"] for row in made.guest_spec["mounts"]] == ["virtiofs"] * 4
    assert made.shares[1].mount is made.guest_spec["mounts"][1]


def test_copies_have_a_limit_together(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(1 << 20))
    made = plan(mounts=[bind(tmp_path / name, f"/{name}", "ro") for name in "abc"])
    assert [copy.destination for copy in made.copies] == ["/a", "/b"]
    assert [live.share.destination for live in made.shares] == ["/c"]


def test_sockets_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        with pytest.raises(CallerError, match="neither a file nor a directory"):
            plan(mounts=[bind(tmp_path / "sock", "/run/sock")])


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (LIMIT_BYTES + 1), "larger than"),
        (b'{"hostname": "\\ud800"}', "no text"),
        (b'{"mounts": [{"source": "/a\\u0000b"}]}', "no text"),
        (b'{"\\udfff": 1}', "no text"),
    ],
)
def test_malformed_documents(data: bytes, word: str) -> None:
    with pytest.raises(CallerError, match=word):
        parse_object(data, "config.json")


def test_any_text_may_be_an_argument() -> None:
    args = ["\\u0000", "\U0001f600", "ä", "\x7f"]
    assert parse_object(json.dumps(args_spec := {"args": args}).encode(), "x") == args_spec


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("process", "root", "hostname", "mounts", "linux", "annotations", "hooks")


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_document_gives_a_plan_or_a_sentence(changes: dict[str, Any]) -> None:
    """Whatever stands where a field of the spec is expected: a plan or a CallerError."""
    with suppress(CallerError):
        assert plan(**changes).guest_spec
