"""The rtnetlink codec: its numbers against the kernel's headers, its parsers against anything."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos import rtnetlink as nl
from vmcell_protos import rtnetlink_rows as rows
from vmcell_protos import rtnetlink_tc as tc

HEADERS = [
    *(
        "stddef.h",
        "stdio.h",
        "sys/socket.h",
        "net/if.h",
        "net/if_arp.h",
        "linux/netlink.h",
        "linux/rtnetlink.h",
    ),
    *("linux/if_link.h", "linux/if_addr.h", "linux/neighbour.h", "linux/pkt_sched.h"),
    *("linux/pkt_cls.h", "linux/if_ether.h", "linux/tc_act/tc_mirred.h"),
]
CONSTANTS = {
    name: value
    for module in (nl, rows, tc)
    for name, value in vars(module).items()
    if name[0].isupper() and type(value) is int and name not in ("INGRESS_HANDLE", "NLA_TYPE_MASK")
}
LAYOUTS = {
    "sizeof(struct nlmsghdr)": nl.NLMSGHDR.size,
    "sizeof(struct ifinfomsg)": nl.IFINFOMSG.size,
    "offsetof(struct ifinfomsg, ifi_index)": 4,
    "sizeof(struct ifaddrmsg)": nl.IFADDRMSG.size,
    "sizeof(struct rtmsg)": nl.RTMSG.size,
    "offsetof(struct rtmsg, rtm_flags)": 8,
    "sizeof(struct ndmsg)": nl.NDMSG.size,
    "offsetof(struct ndmsg, ndm_state)": 8,
    "sizeof(struct rtattr)": nl.RTATTR.size,
    "sizeof(struct tcmsg)": tc.TCMSG.size,
    "offsetof(struct tcmsg, tcm_info)": 16,
    "sizeof(struct tc_u32_sel)": tc.TC_U32_SEL.size,
    "offsetof(struct tc_u32_sel, hmask)": 12,
    "sizeof(struct tc_u32_key)": tc.TC_U32_KEY.size,
    "sizeof(struct tc_mirred)": tc.TC_MIRRED.size,
    "offsetof(struct tc_mirred, eaction)": 20,
    "TC_H_MAJ(TC_H_INGRESS)": tc.INGRESS_HANDLE,
    "(unsigned short)NLA_TYPE_MASK": nl.NLA_TYPE_MASK,
}
ADDRESSES = st.ip_addresses().map(
    lambda address: socket.inet_ntop(nl.family_of(str(address)), address.packed)
)
PARSERS: list[Callable[[bytes], object]] = [
    *(rows.parse_link, rows.parse_address, rows.parse_route, rows.parse_neighbour),
]


def test_every_number_and_layout_is_the_headers(tmp_path: Path) -> None:
    wanted = CONSTANTS | LAYOUTS
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    lines = "".join(f'printf("%u\\n", (unsigned)({text}));\n' for text in wanted)
    source, program = tmp_path / "probe.c", tmp_path / "probe"
    source.write_text(f"{includes}int main(void) {{\n{lines}return 0;\n}}\n")
    subprocess.run(["cc", "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert dict(zip(wanted, map(int, output.split()), strict=True)) == wanted
    assert len(CONSTANTS) > 60


def body_of(request: bytes) -> bytes:
    [(_, _, body)] = nl.messages(request)
    return body


@given(st.dictionaries(st.integers(0, nl.NLA_TYPE_MASK), st.binary(max_size=40), max_size=6))
def test_attributes_come_back(given_attributes: dict[int, bytes]) -> None:
    data = b"".join(nl.attribute(kind, value) for kind, value in given_attributes.items())
    assert nl.attributes(data) == given_attributes


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 7), st.binary(max_size=40))))
def test_messages_come_back(sent: list[tuple[int, int, bytes]]) -> None:
    data = b""
    for kind, flags, body in sent:
        one = nl.message(kind, flags << 4, body)
        data += one + bytes(-len(one) % 4)
    fixed = nl.NLM_F_REQUEST | nl.NLM_F_ACK
    assert list(nl.messages(data)) == [(k, f << 4 | fixed, b) for k, f, b in sent]


@given(
    st.binary(max_size=120),
    st.sampled_from([*PARSERS, nl.attributes, nl.error_number, nl.error_text]),
)
def test_any_bytes_are_a_row_or_a_value_error(
    data: bytes, parse: Callable[[bytes], object]
) -> None:
    with_header = b"\x02\x20\0\0" + data  # AF_INET and a prefix length, to get further
    for candidate in (data, with_header):
        try:
            parse(candidate)
        except ValueError:
            continue


@given(st.binary(max_size=120))
def test_any_bytes_are_messages_or_a_value_error(data: bytes) -> None:
    try:
        found = list(nl.messages(data))
    except ValueError:
        return
    assert sum(nl.NLMSGHDR.size + len(body) for _, _, body in found) <= len(data)


@given(st.integers(1, 2**31 - 1), ADDRESSES, st.integers(0, 32), st.booleans())
def test_an_address_as_sent_is_an_address_as_told(
    index: int, address: str, length: int, prefix_route: bool
) -> None:
    request = nl.add_address(index, address, length, prefix_route=prefix_route)
    assert rows.parse_address(body_of(request)) == rows.Address(index, address, length)


@given(
    st.integers(1, 2**31 - 1),
    ADDRESSES,
    st.integers(1, 32),
    st.none() | ADDRESSES,
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
def test_a_route_as_sent_is_a_route_as_told(
    index: int,
    destination: str,
    length: int,
    gateway: str | None,
    has_source: bool,
    metric: int,
    mtu: int,
) -> None:
    source = ("::5" if ":" in destination else "10.0.0.5") if has_source else ""
    request = nl.add_route(
        index,
        destination,
        length,
        gateway=gateway or "",
        source=source,
        metric=metric,
        mtu=mtu,
    )
    assert rows.parse_route(body_of(request)) == rows.Route(
        index=index,
        table=nl.RT_TABLE_MAIN,
        kind=nl.RTN_UNICAST,
        flags=nl.RTNH_F_ONLINK if gateway else 0,
        destination=destination,
        prefix_length=length,
        gateway=gateway or "",
        source=source,
        metric=metric,
        mtu=mtu,
        several_hops=False,
    )


@given(st.integers(1, 2**31 - 1), ADDRESSES, st.binary(min_size=6, max_size=6))
def test_a_neighbour_as_sent_is_a_neighbour_as_told(index: int, address: str, mac: bytes) -> None:
    request = nl.add_neighbour(index, address, mac)
    told = rows.parse_neighbour(body_of(request))
    assert told == rows.Neighbour(index, nl.NUD_PERMANENT, address, mac.hex(":"))


@given(st.integers(1, (1 << 31) - 1), ADDRESSES, st.integers(0, 32))
def test_what_deletes_an_address_tells_of_it(index: int, address: str, length: int) -> None:
    ((_, _, row),) = nl.messages(nl.add_address(index, address, length))
    ((kind, _, body),) = nl.messages(nl.delete_address(row))
    assert kind == nl.RTM_DELADDR
    assert rows.parse_address(body) == rows.Address(index, address, length)
    with pytest.raises(ValueError, match="netlink attribute"):
        nl.delete_address(row[:-1])


def test_a_link_is_taken_down_and_gets_another_address() -> None:
    ((_, _, down),) = nl.messages(nl.set_link_down(7))
    assert nl.IFINFOMSG.unpack_from(down)[2:] == (7, 0, nl.IFF_UP)
    ((kind, _, body),) = nl.messages(nl.set_mac(7, bytes.fromhex("020000000107")))
    assert kind == nl.RTM_NEWLINK
    assert rows.parse_link(body).mac == "02:00:00:00:01:07"


def test_a_route_to_anywhere_and_its_end() -> None:
    for anywhere in ("0.0.0.0", "::"):
        for request in (nl.add_route(3, anywhere, 0), nl.delete_route(3, anywhere, 0)):
            route = rows.parse_route(body_of(request))
            assert route is not None
            assert (route.destination, route.prefix_length, route.gateway) == (anywhere, 0, "")


def test_other_families_are_no_rows() -> None:
    """A bridge's or MPLS's entries come in the same dumps."""
    for parse, size in (
        (rows.parse_address, nl.IFADDRMSG.size),
        (rows.parse_route, nl.RTMSG.size),
        (rows.parse_neighbour, nl.NDMSG.size),
    ):
        assert parse(bytes([socket.AF_BRIDGE]) + bytes(size - 1)) is None


@pytest.mark.parametrize("answer", [b"", bytes(16), bytes(20), nl.message(16, 0, bytes(4))])
def test_an_answer_that_is_no_acknowledgement(answer: bytes) -> None:
    with pytest.raises(ValueError, match="netlink answer"):
        nl.error_number(answer)


def test_the_errno_of_an_acknowledgement() -> None:
    assert nl.error_number(nl.message(nl.NLMSG_ERROR, 0, nl.I32.pack(-17))) == 17
    assert nl.error_number(nl.message(nl.NLMSG_ERROR, 0, nl.I32.pack(0) + bytes(16))) == 0


def test_what_the_kernel_adds_to_an_errno() -> None:
    body = nl.I32.pack(-22) + bytes(16) + nl.attribute(nl.NLMSGERR_ATTR_MSG, b"Invalid handle\0")
    flags = nl.NLM_F_ACK_TLVS
    assert nl.error_text(nl.message(nl.NLMSG_ERROR, flags, body)) == "Invalid handle"
    assert nl.error_text(nl.message(nl.NLMSG_ERROR, 0, nl.I32.pack(-22) + bytes(16))) == ""
