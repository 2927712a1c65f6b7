"""The unmodified `Volume` of E2B's SDK against the API, a fake node and real directories."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
from collections.abc import Iterator

import pytest
from api_service import ApiService, listening
from e2b import AsyncVolume, NotFoundException, Sandbox, Volume
from e2b.exceptions import (
    AuthenticationException,
    RateLimitException,
    SandboxException,
    VolumeException,
)


@pytest.fixture
def sdk(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with listening(service.app) as address, listening(service.content_app) as content_address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_VOLUME_API_URL", f"http://{content_address}")
        monkeypatch.setenv("E2B_SANDBOX_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("E2B_API_KEY", service.key)
        yield service


@pytest.fixture
def volume(sdk: ApiService) -> Volume:
    return Volume.create("data")


def test_create_connect_list_destroy(sdk: ApiService) -> None:
    made = Volume.create("data")
    assert (made.name, bool(made.token)) == ("data", True)
    info = Volume.get_info(made.volume_id)
    assert (info.volume_id, info.name, info.token) == (made.volume_id, "data", made.token)
    again = Volume.connect(made.volume_id)
    again.write_file("/hello", "there")
    assert made.read_file("hello") == "there"
    other = Volume.create("other")
    assert [row.name for row in Volume.list()] == ["data", "other"]
    with pytest.raises(VolumeException, match="already exists"):
        Volume.create("data")
    with pytest.raises(VolumeException, match="volume name"):
        Volume.create("not a name")
    assert Volume.destroy(made.volume_id) is True
    assert Volume.destroy(made.volume_id) is False
    with pytest.raises(NotFoundException):
        Volume.get_info(made.volume_id)
    assert [row.volume_id for row in Volume.list()] == [other.volume_id]


def test_files(volume: Volume) -> None:
    written = volume.write_file("/test.txt", "Grüße")
    assert (written.name, written.path, written.type.value) == ("test.txt", "/test.txt", "file")
    assert (written.size, written.mode) == (7, 0o644)
    left = datetime.datetime.now(datetime.UTC) - written.mtime
    assert abs(left.total_seconds()) < 60
    assert volume.read_file("/test.txt") == "Grüße"
    content = os.urandom(3_000_000)
    volume.write_file("blob", content)
    assert volume.read_file("blob", format="bytes") == content
    digest = hashlib.sha256()
    for part in volume.read_file("blob", format="stream"):
        digest.update(part)
    assert digest.digest() == hashlib.sha256(content).digest()
    volume.write_file("/empty", "")
    assert volume.read_file("/empty") == ""
    with pytest.raises(VolumeException, match="exists"):
        volume.write_file("/test.txt", "new", force=False)
    volume.write_file("/test.txt", "new", force=True)
    assert volume.read_file("/test.txt") == "new"
    volume.write_file("deep/down/file", "x", force=True)
    assert volume.exists("deep/down/file")
    with pytest.raises(NotFoundException):
        volume.read_file("/missing")
    with pytest.raises(NotFoundException):
        list(volume.read_file("/missing", format="stream"))
    with pytest.raises(NotFoundException):
        volume.write_file("/no/such/folder", "x")


def test_directories(volume: Volume) -> None:
    volume.make_dir("/nested/deep/structure", force=True)
    volume.write_file("/nested/deep/structure/file.txt", "x")
    volume.make_dir("/plain", mode=0o700)
    with pytest.raises(VolumeException, match="exists"):
        volume.make_dir("/plain", force=False)
    assert volume.make_dir("/plain", force=True).mode == 0o700
    assert [entry.path for entry in volume.list("/")] == ["/nested", "/plain"]
    assert [entry.path for entry in volume.list("/nested", depth=3)] == [
        "/nested/deep",
        "/nested/deep/structure",
        "/nested/deep/structure/file.txt",
    ]
    with pytest.raises(NotFoundException):
        volume.list("/missing")
    with pytest.raises(NotFoundException):
        volume.make_dir("/missing/below")
    volume.remove("/nested")
    assert not volume.exists("/nested")
    with pytest.raises(NotFoundException):
        volume.remove("/nested")


def test_metadata(volume: Volume) -> None:
    volume.write_file("/file", "x", mode=0o640)
    assert volume.get_info("/file").mode == 0o640
    updated = volume.update_metadata("/file", mode=0o755)
    assert (updated.path, updated.mode, updated.type.value) == ("/file", 0o755, "file")
    with pytest.raises(NotFoundException):
        volume.update_metadata("/missing", mode=0o644)
    with pytest.raises(VolumeException, match="mode"):
        volume.update_metadata("/file", mode=0o4755)


def test_a_wrong_token(volume: Volume) -> None:
    with pytest.raises(AuthenticationException):
        volume.get_info("/", token="vol_" + "0" * 64)


def test_limits_are_rate_limits(sdk: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(sdk.config.volumes_per_team):
        Volume.create(f"v{number}")
    with pytest.raises(RateLimitException, match="at most 100"):
        Volume.create("more")


def test_mounts(sdk: ApiService, volume: Volume) -> None:
    sandbox = Sandbox.create(template="base", volume_mounts={"/mnt/data": volume, "/m2": "data"})
    info = sandbox.get_info()
    assert info.volume_mounts == [
        {"name": "data", "path": "/mnt/data"},
        {"name": "data", "path": "/m2"},
    ]
    with pytest.raises(VolumeException, match=sandbox.sandbox_id):
        Volume.destroy(volume.volume_id)
    sandbox.kill()
    assert Volume.destroy(volume.volume_id) is True
    with pytest.raises(SandboxException, match="404: volume data was not found"):
        Sandbox.create(template="base", volume_mounts={"/mnt/data": volume})


def test_the_asynchronous_class(sdk: ApiService) -> None:
    async def use() -> None:
        volume = await AsyncVolume.create("async")
        content = os.urandom(200_000)
        await volume.make_dir("/a/b", force=True)
        assert (await volume.write_file("/a/b/f", content)).size == len(content)
        parts = [part async for part in await volume.read_file("/a/b/f", format="stream")]
        assert b"".join(parts) == content
        with pytest.raises(NotFoundException):
            async for _ in await volume.read_file("/missing", format="stream"):
                pass
        assert [entry.path for entry in await volume.list("/a", depth=2)] == ["/a/b", "/a/b/f"]
        assert (await volume.update_metadata("/a/b/f", mode=0o600)).mode == 0o600
        await volume.remove("/a")
        assert await volume.exists("/a") is False
        assert await AsyncVolume.destroy(volume.volume_id) is True
        assert await AsyncVolume.destroy(volume.volume_id) is False

    asyncio.run(use())
