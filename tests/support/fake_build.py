"""A guest and images for builds that have neither a machine nor containerd."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vmcell_api.node.blob_store import Blob
from vmcell_api.node.build_images import CACHE
from vmcell_api.node.build_records import BuildRecord
from vmcell_api.node.build_run import BuildRequest, BuildRun
from vmcell_api.node.guest_process import Command, CommandRefused
from vmcell_api.node.image_json import LAYER_TYPE, ImageState
from vmcell_api.node.upload_files import Upload
from vmcell_protos.errors import CallerError, HostError

BASE_BLOB = Blob(digest="sha256:" + "0" * 64, size=10, media_type=LAYER_TYPE)
USERS = ("root", "user", "worker")


class FakeImages:
    """`BuildImages` with the images in a dict; `published` are the builds' own."""

    def __init__(self) -> None:
        self.kept: dict[str, ImageState] = {}
        self.published: dict[str, ImageState] = {}
        self.leases: list[str] = []
        self.here = {"docker.io/library/debian:12"}
        self.unpacked: list[ImageState] = []

    @contextlib.contextmanager
    def lease(self, build_id: str) -> Iterator[str]:
        self.leases.append(build_id)
        try:
            yield f"lease-{build_id}"
        finally:
            self.leases.remove(build_id)

    def drop_leases(self) -> None:
        self.leases.clear()

    def is_here(self, reference: str) -> bool:
        return reference in self.here

    def base(
        self, reference: str, login: object, cancelled: Callable[[], bool]
    ) -> tuple[str, ImageState]:
        if reference not in self.here:
            raise CallerError(f"image {reference} could not be pulled: no such host")
        layers = ((BASE_BLOB.digest, BASE_BLOB),)
        return "sha256:" + "a" * 64, ImageState(layers=layers, environment={"PATH": "/bin"})

    def cached(self, key: str) -> ImageState | None:
        return self.kept.get(key)

    def keep(self, key: str, team_id: str, state: ImageState, lease: str) -> str:
        self.kept[key] = state
        return CACHE + key

    def add_layer(
        self, state: ImageState, pieces: Iterator[bytes], ref: str, lease: str, limit_bytes: int
    ) -> ImageState:
        data = b"".join(pieces)
        if not data:
            return state
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        return state.with_layer(Blob(digest=digest, size=len(data), media_type=LAYER_TYPE))

    def unpack(self, state: ImageState, lease: str) -> None:
        self.unpacked.append(state)

    def publish(self, build_id: str, state: ImageState, lease: str) -> str:
        self.published[build_id] = state
        return f"vmcell.local/build/{build_id}"

    def forget(self, build_id: str) -> None:
        self.published.pop(build_id, None)

    def prune(self) -> int:
        return 0


class FakeGuest:
    """`GuestProcesses` and `Machines` in one: commands are looked up in `answers`, by their text.

    An answer is (exit status, output); a command that writes leaves its text as the next layer.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        self.ran: list[Command] = []
        self.uploads: list[tuple[str, bytes]] = []
        self.boots: list[str] = []
        self.ends = 0
        self.running = threading.Event()
        self.gone = threading.Event()
        self._written = b""

    # Machines.

    def boot(self, request: BuildRequest, image: str) -> FakeGuest:
        self.boots.append(image)
        return self

    def end(self) -> None:
        self.ends += 1
        self.gone.set()

    # GuestProcesses.

    def run(
        self, command: Command, *, deadline: float, on_output: Callable[[str, bytes], None]
    ) -> int:
        if command.user not in USERS:
            raise CommandRefused(
                f"unauthenticated: invalid username: '{command.user}'", code="unauthenticated"
            )
        self.ran.append(command)
        if command.text == "hang":
            self.running.set()
            assert self.gone.wait(30)
            raise HostError("the guest was lost", code="aborted")
        if time.monotonic() > deadline:
            raise HostError("the command did not end in time", code="deadline_exceeded")
        status, output = self.answers.get(command.text, (0, ""))
        for line in output.splitlines(keepends=True):
            on_output("stderr" if line.startswith("!") else "stdout", line.encode())
        if command.text.startswith("printf %s"):
            value = command.text.removeprefix('printf %s "').removesuffix('"')
            for name, text in command.environment.items():
                value = value.replace(f"${name}", text)
            on_output("stdout", value.encode())
        elif "nothing" not in command.text:
            self._written += command.text.encode()
        return status

    def start(self, command: Command, *, deadline: float) -> None:
        self.run(command, deadline=deadline, on_output=lambda kind, data: None)

    def upload(self, path: str, file: io.BytesIO, size: int, *, deadline: float) -> None:
        self.uploads.append((path, file.read()))

    @contextlib.contextmanager
    def layer(self, *, deadline: float) -> Iterator[Iterator[bytes]]:
        data, self._written = self._written, b""
        yield iter([data])


def build_run(
    folder: Path, images: FakeImages, guest: FakeGuest, request: BuildRequest, **changes: object
) -> BuildRun:
    """A run of `request` with a record in `folder`."""
    record = BuildRecord(folder / request.build_id)
    record.create("i" + "0" * 19)

    def open_upload(team_id: str, files_hash: str) -> Upload:
        return Upload(file=io.BytesIO(files_hash.encode()), size=64, packed=True)

    values = {"deadline": time.monotonic() + 60, **changes}
    return BuildRun(
        request=request,
        record=record,
        images=images,  # type: ignore[arg-type]  # a stand-in
        machines=guest,  # type: ignore[arg-type]  # a stand-in
        open_upload=open_upload,
        layer_limit_bytes=1 << 20,
        **values,  # type: ignore[arg-type]  # test values
    )
