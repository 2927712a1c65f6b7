"""Volumes in real guests: two sandboxes and a client of the content API share one."""

from __future__ import annotations

import hashlib
import os
import secrets

import pytest
from dev_vm import DevVm
from e2b import Sandbox, Volume
from e2b.exceptions import VolumeException

pytestmark = pytest.mark.vm

PATIENCE_S = 300
VOLUME_PORT = 3001


@pytest.mark.deep
def test_two_sandboxes_share_a_volume(service: DevVm, nothing_left: None) -> None:
    name = f"shared-{secrets.token_hex(4)}"  # the store outlives a dev VM
    volume = Volume.create(name)
    content = os.urandom(1 << 20)
    volume.write_file("/from-client", content)
    volume.write_file("/roots", "root's own", uid=0, gid=0, mode=0o600)
    options = {"template": "base", "timeout": 900, "request_timeout": PATIENCE_S}
    mounts = {"/mnt/data": volume}
    with (
        Sandbox.create(volume_mounts=mounts, **options) as one,
        Sandbox.create(volume_mounts=mounts, **options) as two,
    ):
        assert one.get_info().volume_mounts == [{"name": name, "path": "/mnt/data"}]

        def run(sandbox: Sandbox, command: str, user: str = "user") -> str:
            return sandbox.commands.run(command, user=user, timeout=PATIENCE_S).stdout

        # what the client wrote, the guests read; its owner is their user
        digest = hashlib.sha256(content).hexdigest()
        assert run(one, "sha256sum /mnt/data/from-client").split()[0] == digest
        assert run(one, "stat -c '%u:%g %a' /mnt/data /mnt/data/from-client").splitlines() == [
            "1000:1000 777",
            "1000:1000 644",
        ]
        assert run(one, "cat /mnt/data/roots || echo closed").strip() == "closed"
        # what one guest writes, the other and the client see, with owner and mode
        run(one, "mkdir /mnt/data/d && echo first > /mnt/data/d/of-user")
        run(one, "echo second > /mnt/data/d/of-root && chmod 4755 /mnt/data/d/of-root", "root")
        run(one, "cd /mnt/data && ln -s /etc/passwd link && mkfifo fifo && ln d/of-user hard")
        assert run(two, "cat /mnt/data/d/of-user /mnt/data/d/of-root") == "first\nsecond\n"
        two.files.write("/mnt/data/from-envd", "by envd", request_timeout=PATIENCE_S)
        assert volume.read_file("/from-envd") == "by envd"
        seen = {entry.path: entry for entry in volume.list("/", depth=2)}
        assert (seen["/d/of-user"].uid, seen["/d/of-root"].uid) == (1000, 0)
        assert (seen["/from-envd"].uid, seen["/link"].target) == (1000, "/etc/passwd")
        assert (seen["/fifo"].type.value, seen["/link"].type.value) == ("unknown", "symlink")
        assert volume.read_file("/hard") == "first\n"
        for path in ("/link", "/fifo"):
            with pytest.raises(VolumeException):
                volume.read_file(path)
        device = "mknod /mnt/data/null c 1 3 && cat /mnt/data/null || echo refused"
        assert run(one, device, "root").strip() == "refused"
        # what the client removes or changes, the guests lose or have
        volume.remove("/d")
        volume.write_file("/from-client", "short", force=True)
        gone = "for i in $(seq 50); do [ -e /mnt/data/d ] || exit 0; sleep 0.2; done; exit 1"
        run(two, gone)
        fresh = 'until [ "$(cat /mnt/data/from-client)" = short ]; do sleep 0.2; done; echo yes'
        assert run(two, f"timeout 20 sh -c '{fresh}'") == "yes\n"
        with pytest.raises(VolumeException, match="is mounted in"):
            Volume.destroy(volume.volume_id)
    assert volume.read_file("/hard") == "first\n", "the volume outlives its sandboxes"
    assert Volume.destroy(volume.volume_id) is True
    top = "/var/lib/vmcell/volumes"
    assert volume.volume_id not in service.check("ls", f"{top}/data")
    assert service.check("ls", f"{top}/trash", f"{top}/uploads").split() == [
        *(f"{top}/trash:", f"{top}/uploads:"),
    ]
