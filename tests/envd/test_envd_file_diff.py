"""noded's list of a guest's files, asked of the real envd."""

from __future__ import annotations

import json

import pytest
from envd_client import request
from envd_harness import Envd

from vmcell_api.node.file_diff import compare, read_tree
from vmcell_protos.errors import GuestError

pytestmark = pytest.mark.root


@pytest.mark.deep  # lists all files of the machine it runs on
def test_what_was_written_between_two_lists(fresh_envd: Envd) -> None:
    token = json.dumps({"accessToken": "t0ken"}).encode()
    assert request(fresh_envd, "POST", "/init", token).status == 204
    headers = {"X-Access-Token": "t0ken", "Content-Type": "application/octet-stream"}

    def write(path: str, data: bytes) -> None:
        query = f"path={path}&username=user"
        answer = request(fresh_envd, "POST", f"/files?{query}", data, headers)
        assert answer.status == 200, answer

    write("/home/user/kept", b"kept")
    write("/home/user/changed", b"one")
    before = read_tree("127.0.0.1", "t0ken", port=fresh_envd.port)
    assert before["/etc/passwd"][0] == "FILE_TYPE_FILE"
    assert not [path for path in before if path.startswith(("/proc/", "/sys/", "/dev/"))]
    write("/home/user/changed", b"another")
    write("/home/user/deep/er/new", b"new")
    after = read_tree("127.0.0.1", "t0ken", port=fresh_envd.port)
    rows = compare(before, after)
    changes = {row.path: (row.what, row.size_before, row.size_after) for row in rows}
    assert changes["/home/user/changed"] == ("modified", 3, 7)
    assert changes["/home/user/deep/er/new"] == ("added", 0, 3)
    assert changes["/home/user/deep"][0] == "added"
    assert "/home/user/kept" not in changes
    with pytest.raises(GuestError, match="401"):
        read_tree("127.0.0.1", "wrong", port=fresh_envd.port)
