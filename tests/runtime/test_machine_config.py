"""MachineConfig: limits named with field and value, JSON both ways, descriptors named once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError
from vmcell_runtime.config import (
    BlkConfig,
    FsConfig,
    MachineConfig,
    NetConfig,
    PmemConfig,
    VsockConfig,
    from_json,
)

LEAST: dict[str, Any] = {"vcpu_count": 1, "memory_mib": 64, "kernel_descriptor": 0}
MAC = "02:00:00:00:00:01"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vcpu_count": 99}, "vcpu_count is 99; give 1 to 8"),
        ({"vcpu_count": 0}, "vcpu_count is 0; give 1 to 8"),
        ({"vcpu_count": True}, "vcpu_count is True; give a value of type int"),
        ({"vcpu_count": "2"}, "vcpu_count is '2'; give a value of type int"),
        ({"memory_mib": 1}, "memory_mib is 1; give 64 to 262144"),
        ({"memory_mib": 262145}, "memory_mib is 262145; give 64 to 262144"),
        ({"kernel_descriptor": -1}, "kernel_descriptor is -1; give 0 to 63"),
        ({"console_descriptor": 64}, "console_descriptor is 64; give 0 to 63"),
        ({"command_line": "a\nb"}, "command_line is 'a\\nb'; give printable ASCII only"),
        ({"command_line": "ä"}, "command_line is 'ä'; give printable ASCII only"),
        ({"command_line": "x" * 1537}, "command_line length is 1537; give 0 to 1536"),
        ({"spare_windows": 25}, "spare_windows is 25; give 0 to 24"),
        ({"spare_windows": -1}, "spare_windows is -1; give 0 to 24"),
        ({"balloon": 1}, "balloon is 1; give a value of type bool"),
        ({"pmem": [PmemConfig(descriptor=n) for n in range(9)]}, "pmem count is 9; give 0 to 8"),
        ({"fs": [FsConfig(descriptor=n, tag="a") for n in (1, 2)]}, "fs count is 2; give 0 to 1"),
    ],
)
def test_what_is_out_of_range_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CallerError) as raised:
        MachineConfig(**(LEAST | change))
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: VsockConfig(guest_cid=2), "vsock.guest_cid is 2; give 3 to 4294967294"),
        (lambda: VsockConfig(guest_cid=3, listen_ports=(0,)), "vsock.listen_ports is 0"),
        (lambda: VsockConfig(guest_cid=3, listen_ports=(5, 5)), "name each port once"),
        (lambda: NetConfig(tap_descriptor=1, mac="02:00"), "net.mac is '02:00'; give six pairs"),
        (lambda: NetConfig(tap_descriptor=1, mac="03" + MAC[2:]), "first octet .* is even"),
        (lambda: NetConfig(tap_descriptor=1, mac=MAC.upper() + "A"), "net.mac"),
        (lambda: NetConfig(tap_descriptor=1, mac=MAC, mtu=67), "net.mtu is 67; give 576 to 65535"),
        (lambda: BlkConfig(descriptor=1, read_only=1), "blk.read_only is 1"),  # type: ignore[arg-type]
        (lambda: PmemConfig(descriptor=99), "pmem.descriptor is 99; give 0 to 63"),
        (lambda: FsConfig(descriptor=1, tag=""), "fs.tag length is 0; give 1 to 36"),
        (lambda: FsConfig(descriptor=1, tag="x" * 37), "fs.tag length is 37; give 1 to 36"),
        (lambda: FsConfig(descriptor=1, tag="a\0b"), "fs.tag is .*; give printable ASCII"),
        (lambda: FsConfig(descriptor=64, tag="a"), "fs.descriptor is 64; give 0 to 63"),
    ],
)
def test_devices_name_their_own_fields(make: Any, sentence: str) -> None:
    with pytest.raises(CallerError, match=sentence):
        make()


def test_descriptors_must_be_there_and_named_once() -> None:
    config = MachineConfig(**LEAST, pmem=(PmemConfig(descriptor=2),), console_descriptor=1)
    config.check_descriptors(3)
    with pytest.raises(CallerError, match="descriptor 2 is named, but only 2 came along"):
        config.check_descriptors(2)
    shared = MachineConfig(**LEAST, fs=(FsConfig(descriptor=7, tag="a"),))
    with pytest.raises(CallerError, match="descriptor 7 is named"):
        shared.check_descriptors(7)
    twice = MachineConfig(**LEAST, blk=(BlkConfig(descriptor=0),))
    with pytest.raises(CallerError, match="more than once"):
        twice.check_descriptors(5)


def test_spare_windows_stand_behind_every_other_device() -> None:
    config = MachineConfig(**LEAST)
    assert (config.fixed_windows, config.spare_window_numbers) == (1, range(1, 1))
    full = MachineConfig(
        **LEAST,
        pmem=(PmemConfig(descriptor=1),),
        blk=(BlkConfig(descriptor=2), BlkConfig(descriptor=3)),
        net=(NetConfig(tap_descriptor=4, mac=MAC),),
        vsock=VsockConfig(guest_cid=3),
        balloon=True,
        spare_windows=24,
    )
    assert full.fixed_windows == 7
    assert full.spare_window_numbers == range(7, 31)


indexes = st.integers(0, 63)
configs = st.builds(
    MachineConfig,
    vcpu_count=st.integers(1, 8),
    memory_mib=st.integers(64, 262144),
    kernel_descriptor=indexes,
    command_line=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    pmem=st.lists(st.builds(PmemConfig, descriptor=indexes), max_size=8),
    blk=st.lists(st.builds(BlkConfig, descriptor=indexes, read_only=st.booleans()), max_size=4),
    net=st.lists(
        st.builds(
            NetConfig,
            tap_descriptor=indexes,
            mac=st.just(MAC),
            mtu=st.integers(576, 65535),
            in_kernel=st.booleans(),
            vhost_descriptor=st.none() | indexes,
        ),
        max_size=4,
    ),
    fs=st.lists(
        st.builds(
            FsConfig,
            descriptor=indexes,
            tag=st.text(
                st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=36
            ),
        ),
        max_size=1,
    ),
    vsock=st.none()
    | st.builds(
        VsockConfig,
        guest_cid=st.integers(3, 100),
        listen_ports=st.lists(st.integers(1, 2**32 - 2), max_size=4, unique=True),
    ),
    console_descriptor=st.none() | indexes,
    spare_windows=st.integers(0, 24),
    balloon=st.booleans(),
)


@given(configs)
def test_json_goes_round(config: MachineConfig) -> None:
    assert from_json(json.loads(json.dumps(asdict(config)))) == config


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(asdict(MachineConfig(**LEAST)))), trees)
def test_any_other_json_is_the_callers_error(field: str, value: object) -> None:
    tree = asdict(MachineConfig(**LEAST)) | {field: value}
    try:
        config = from_json(tree)
    except CallerError:
        return
    assert from_json(asdict(config)) == config


@pytest.mark.parametrize("tree", [None, [], 5, {}, {**LEAST, "extra": 1}])
def test_what_is_no_configuration_is_refused(tree: object) -> None:
    with pytest.raises(CallerError):
        from_json(tree)
