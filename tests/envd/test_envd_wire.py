"""envd's sans-I/O parsers: frames, messages, targets, headers, signatures, Go's texts."""

from __future__ import annotations

import base64
import json
import signal
import stat
import struct
from email.utils import formatdate, parsedate_to_datetime

import pytest
from e2b.sandbox.signature import get_signature
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent.envd.accounts import parse_group, parse_passwd
from vmcell_agent.envd.paths import resolve_path
from vmcell_agent.envd.wire.envelope import EnvelopeDecoder, encode_end, encode_envelope
from vmcell_agent.envd.wire.fields import Fields, dump_message, parse_message
from vmcell_agent.envd.wire.gotext import exit_text, file_mode_text, rfc3339
from vmcell_agent.envd.wire.headers import (
    ByteRange,
    RangeNotSatisfiable,
    basic_user,
    http_date,
    inline_disposition,
    parse_http_date,
    parse_range,
    timeout_seconds,
)
from vmcell_agent.envd.wire.multipart import header_parameters
from vmcell_agent.envd.wire.signature import SignatureError, check_signature
from vmcell_agent.envd.wire.target import split_target
from vmcell_protos.errors import CallerError

NOW_S = 1_700_000_000.0


class TestEnvelope:
    @given(
        st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=50)), max_size=6),
        st.integers(1, 20),
    )
    def test_any_split_gives_the_same_frames(
        self, frames: list[tuple[int, bytes]], step: int
    ) -> None:
        wire = b"".join(struct.pack(">BI", flags, len(p)) + p for flags, p in frames)
        decoder = EnvelopeDecoder(100)
        found = [f for n in range(0, len(wire), step) for f in decoder.feed(wire[n : n + step])]
        assert found == frames
        assert decoder.pending_bytes == 0

    @given(st.binary(max_size=50), st.integers(0, 255))
    def test_encoding_is_what_is_decoded(self, payload: bytes, flags: int) -> None:
        assert EnvelopeDecoder(50).feed(encode_envelope(payload, flags)) == [(flags, payload)]

    def test_a_large_frame_is_refused_by_its_prefix_alone(self) -> None:
        with pytest.raises(CallerError) as caught:
            EnvelopeDecoder(10).feed(struct.pack(">BI", 0, 11))
        assert caught.value.code == "resource_exhausted"

    def test_a_cut_frame_is_seen(self) -> None:
        decoder = EnvelopeDecoder(10)
        assert decoder.feed(b"\0\0\0\0\5abc") == []
        assert decoder.pending_bytes == 8

    def test_end_frames(self) -> None:
        assert encode_end() == b"\2\0\0\0\2{}"
        flags, payload = EnvelopeDecoder(1000).feed(encode_end("not_found", "no 'x'"))[0]
        assert flags == 2
        assert json.loads(payload) == {"error": {"code": "not_found", "message": "no 'x'"}}


class TestFields:
    def test_both_spellings_null_and_unknown(self) -> None:
        message = parse_message(b'{"include_entry": true, "cmd": null, "later": [1]}')
        assert message.boolean("includeEntry")
        assert message.text("cmd") == ""
        assert parse_message(b"").text("cmd") == ""

    @pytest.mark.parametrize(
        "body",
        [
            b"[]",
            b"1",
            b"{",
            b"\xff",
            b'{"a":' * 100_000,
            b"nul",
            b"\0\0\0{",
            b"{\0}\0",
            b"\xef\xbb\xbf{}",
        ],
    )
    def test_no_object_is_refused(self, body: bytes) -> None:
        with pytest.raises(CallerError):
            parse_message(body)

    @pytest.mark.parametrize("value", [0, 7, 4294967295, "12", 3.0])
    def test_uint32(self, value: object) -> None:
        assert Fields({"pid": value}).uint32("pid") == int(str(value).removesuffix(".0"))

    @pytest.mark.parametrize("value", [-1, 4294967296, "x", "-1", "", 1.5, True, [], "9" * 5000])
    def test_no_uint32(self, value: object) -> None:
        with pytest.raises(CallerError, match="pid"):
            Fields({"pid": value}).uint32("pid")

    @given(st.binary(max_size=40))
    def test_octets_in_every_spelling(self, data: bytes) -> None:
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(data).decode()
            assert Fields({"stdin": text}).octets("stdin") == data
            assert Fields({"stdin": text.rstrip("=")}).octets("stdin") == data

    @pytest.mark.parametrize("text", ["a", "ab$d", "a b c d", "====", "abcde", 1, "\u00e9"])
    def test_no_octets(self, text: object) -> None:
        fields = Fields({"stdin": text})
        if text == "====":
            assert fields.octets("stdin") == b""
            return
        with pytest.raises(CallerError):
            fields.octets("stdin")

    @pytest.mark.parametrize("value", ["a\0b", "\ud800", 5, {}, ["a"]])
    def test_no_text(self, value: object) -> None:
        with pytest.raises(CallerError, match="path"):
            Fields({"path": value}).text("path")

    def test_oneof(self) -> None:
        assert Fields({"pid": 1}).which(("pid", "tag")) == "pid"
        assert Fields({}).which(("pid", "tag")) is None
        with pytest.raises(CallerError):
            Fields({"pid": 1, "tag": "x"}).which(("pid", "tag"))

    def test_nested_fields_are_named_whole(self) -> None:
        with pytest.raises(CallerError, match=r"process\.cwd"):
            Fields({"process": {"cwd": 1}}).message("process").text("cwd")

    def test_names_that_are_no_utf8_stay_readable_json(self) -> None:
        assert json.loads(dump_message({"name": "a\udcff"})) == {"name": "a\ufffd"}


class TestTarget:
    @pytest.mark.parametrize(
        ("target", "path", "query"),
        [
            (b"/files?path=%2Fa%20b&x", "/files", {"path": "/a b", "x": ""}),
            (b"/files?path=a+b&path=c", "/files", {"path": "a b"}),
            (b"/a+b", "/a+b", {}),
            (b"http://host:1/files?p=1", "/files", {"p": "1"}),
            (b"http://host", "/", {}),
            (b"/f?u=http://x/y", "/f", {"u": "http://x/y"}),
            (b"/f?p=%C3%A9", "/f", {"p": "\u00e9"}),
        ],
    )
    def test_split(self, target: bytes, path: str, query: dict[str, str]) -> None:
        assert split_target(target) == (path, query)

    @pytest.mark.parametrize("target", [b"/%", b"/f?p=%zz", b"/f?p=%ff", b"/%4"])
    def test_bad_escapes(self, target: bytes) -> None:
        with pytest.raises(ValueError):
            split_target(target)


class TestHeaders:
    @pytest.mark.parametrize(
        ("credentials", "user"),
        [(b"user:", "user"), (b"root:secret:x", "root"), (b":", None), ("é:".encode(), "é")],
    )
    def test_basic(self, credentials: bytes, user: str | None) -> None:
        assert basic_user("basic " + base64.b64encode(credentials).decode()) == user

    @pytest.mark.parametrize("value", ["Basic", "Basic !", "Basic dXNlcg==", "Basic /w=="])
    def test_bad_basic(self, value: str) -> None:
        with pytest.raises(ValueError):
            basic_user(value)

    def test_other_schemes_name_no_user(self) -> None:
        assert basic_user("Bearer abc") is None
        assert basic_user(None) is None

    @pytest.mark.parametrize(("text", "seconds"), [(None, None), ("0", None), ("1500", 1.5)])
    def test_timeout(self, text: str | None, seconds: float | None) -> None:
        assert timeout_seconds(text) == seconds

    @pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "12345678901", "\u0661"])
    def test_bad_timeout(self, text: str) -> None:
        with pytest.raises(ValueError):
            timeout_seconds(text)

    @given(st.integers(0, 4_000_000_000))
    def test_dates(self, unix_s: int) -> None:
        text = http_date(unix_s)
        assert text == formatdate(unix_s, usegmt=True)
        assert parse_http_date(text) == unix_s == parsedate_to_datetime(text).timestamp()

    @pytest.mark.parametrize("text", [None, "", "x", "Sun, 06 Xxx 1994 08:49:37 GMT"])
    def test_other_dates_are_ignored(self, text: str | None) -> None:
        assert parse_http_date(text) is None

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("bytes=0-9", (0, 10)),
            ("bytes=90-", (90, 100)),
            ("bytes=-5", (95, 100)),
            ("bytes=-500", (0, 100)),
            ("bytes=50-1000", (50, 100)),
            ("bytes=1-2,4-5", None),
            ("lines=1-2", None),
            ("bytes=-", None),
            ("bytes=9-1", None),
            (None, None),
        ],
    )
    def test_ranges(self, text: str | None, part: tuple[int, int] | None) -> None:
        assert parse_range(text, 100) == (part and ByteRange(*part))

    @pytest.mark.parametrize("text", ["bytes=100-", "bytes=-0", "bytes=200-300"])
    def test_ranges_outside(self, text: str) -> None:
        with pytest.raises(RangeNotSatisfiable):
            parse_range(text, 100)

    @given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1))
    def test_disposition_is_one_safe_header(self, name: str) -> None:
        value = inline_disposition(name)
        assert value.isascii()
        assert value.isprintable()
        found = header_parameters(value)
        if "filename" in found:
            assert found["filename"] == name


class TestSignature:
    @given(
        st.text(st.characters(codec="utf-8"), max_size=20),
        st.sampled_from(["read", "write"]),
        st.sampled_from([None, "user", "root"]),
    )
    def test_the_sdk_signs_what_is_accepted(
        self, path: str, operation: str, user: str | None
    ) -> None:
        signed = get_signature(path, operation, user, "token", 3600)
        query = {"path": path, "signature": signed["signature"]}
        if signed["expiration"]:
            query["signature_expiration"] = str(signed["expiration"])
        if user:
            query["username"] = user
        check_signature(query, operation, "token", signed["expiration"] - 1)
        other = "read" if operation == "write" else "write"
        for wrong in (other, operation):
            token = "token" if wrong == other else "tokem"
            with pytest.raises(SignatureError, match=r"^invalid signature$"):
                check_signature(query, wrong, token, NOW_S)
        with pytest.raises(SignatureError, match=r"^signature is already expired$"):
            check_signature(query, operation, "token", signed["expiration"] + 1)

    def test_unsigned(self) -> None:
        with pytest.raises(SignatureError, match=r"^missing signature query parameter$"):
            check_signature({"path": "/a"}, "read", "token", NOW_S)

    def test_odd_texts(self) -> None:
        with pytest.raises(SignatureError):
            check_signature({"signature": "\ud800é"}, "read", "token", NOW_S)


class TestGoTexts:
    @pytest.mark.parametrize(
        ("mode", "text"),
        [
            (stat.S_IFREG | 0o644, "-rw-r--r--"),
            (stat.S_IFDIR | 0o755, "drwxr-xr-x"),
            (stat.S_IFLNK | 0o777, "Lrwxrwxrwx"),
            (stat.S_IFDIR | 0o1777, "dtrwxrwxrwx"),
            (stat.S_IFREG | 0o4755, "urwxr-xr-x"),
            (stat.S_IFCHR | 0o666, "Dcrw-rw-rw-"),
            (stat.S_IFBLK | 0o660, "Drw-rw----"),
            (stat.S_IFIFO | 0o600, "prw-------"),
        ],
    )
    def test_file_modes(self, mode: int, text: str) -> None:
        assert file_mode_text(mode) == text

    @pytest.mark.parametrize(
        ("ns", "text"),
        [
            (0, "1970-01-01T00:00:00Z"),
            (1_714_564_800_500_000_000, "2024-05-01T12:00:00.500Z"),
            (1_714_564_800_000_000_001, "2024-05-01T12:00:00.000000001Z"),
            (-1_000_000, "1969-12-31T23:59:59.999Z"),
        ],
    )
    def test_times(self, ns: int, text: str) -> None:
        assert rfc3339(ns) == text

    @pytest.mark.parametrize(
        ("wait_status", "expected"),
        [
            (0, (0, True, "exit status 0")),
            (7 << 8, (7, True, "exit status 7")),
            (signal.SIGKILL, (-1, False, "signal: killed")),
            (signal.SIGTERM, (-1, False, "signal: terminated")),
            (signal.SIGSEGV | 0x80, (-1, False, "signal: segmentation fault (core dumped)")),
            (64, (-1, False, "signal: signal 64")),
        ],
    )
    def test_ends(self, wait_status: int, expected: tuple[int, bool, str]) -> None:
        assert exit_text(wait_status) == expected


class TestPathsAndAccounts:
    @pytest.mark.parametrize(
        ("path", "resolved"),
        [
            ("/a/../b//c/", "/b/c"),
            ("//etc", "/etc"),
            ("~", "/home/u"),
            ("~/x", "/home/u/x"),
            ("~/../../..", "/"),
            ("x/./y", "/home/u/x/y"),
            ("", "/home/u"),
            ("/..", "/"),
        ],
    )
    def test_resolution(self, path: str, resolved: str) -> None:
        assert resolve_path(path, "/home/u") == resolved

    def test_the_empty_path_is_the_default_directory(self) -> None:
        assert resolve_path("", "/home/u", "/srv") == "/srv"
        assert resolve_path("x", "/home/u", "/srv") == "/home/u/x"

    @pytest.mark.parametrize("path", ["~root", "~root/x", "a\0b"])
    def test_refused_paths(self, path: str) -> None:
        with pytest.raises(CallerError):
            resolve_path(path, "/home/u")

    @given(st.text())
    def test_any_path_is_absolute_and_clean_or_refused(self, path: str) -> None:
        try:
            resolved = resolve_path(path, "/home/u")
        except CallerError:
            return
        assert resolved.startswith("/")
        assert ".." not in resolved.split("/")
        assert "//" not in resolved

    def test_account_files_with_rubbish_in_them(self) -> None:
        names, members = parse_group("root:x:0:\nstaff:x:50:u, v\nbad\nx:x:y:u\n")
        assert names == {0: "root", 50: "staff"}
        text = "u:x:7:8:,,:/home/u:/bin/sh\nbad:x:a:b:c:d:e\n:x:1:1::/:\nu:x:9:9::/:\nh:x:1:1::\n"
        accounts = parse_passwd(text, members)
        assert sorted(accounts) == ["h", "u"]
        assert (accounts["u"].uid, accounts["u"].groups) == (7, (8, 50))
        assert accounts["h"].home == "/"

    @given(st.text())
    def test_no_text_breaks_them(self, text: str) -> None:
        _, members = parse_group(text)
        parse_passwd(text, members)
