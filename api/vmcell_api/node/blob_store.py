"""Blobs, images and unpacked layers of containerd: what a build writes.

Everything is written under a lease, so that the garbage collector leaves it alone until an image
names it. Blobs refer to each other by labels (containerd's gc docs): a manifest to its config and
layers, the config to the snapshot that its layers were unpacked into.
"""

from __future__ import annotations

import contextlib
import hashlib
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from vmcell_api.node.containerd import Containerd, translate
from vmcell_protos.errors import CallerError, HostError
from vmcell_protos.pb.containerd import (
    content_pb2,
    content_pb2_grpc,
    diff_pb2,
    diff_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    types_pb2,
)

CALL_TIMEOUT_S = 60.0
# A layer of some GiB on a slow disk.
LAYER_TIMEOUT_S = 1800.0
PIECE_BYTES = 1 << 20
GC_CONTENT = "containerd.io/gc.ref.content."
GC_SNAPSHOT = "containerd.io/gc.ref.snapshot."


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A blob of the content store; `digest` is "sha256:<hex>"."""

    digest: str
    size: int
    media_type: str

    def descriptor(self) -> dict[str, object]:
        """As image JSON has it (OCI image-spec, descriptor.md)."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class BlobStore:
    """Thread-safe; the connection stays the caller's."""

    def __init__(self, containerd: Containerd) -> None:
        self._containerd = containerd
        self._content = containerd.stub(content_pb2_grpc.ContentStub)
        self._diff = containerd.stub(diff_pb2_grpc.DiffStub)
        self._images = containerd.stub(images_pb2_grpc.ImagesStub)
        self._snapshots = containerd.stub(snapshots_pb2_grpc.SnapshotsStub)

    # Blobs.

    def write_bytes(
        self, data: bytes, *, ref: str, media_type: str, labels: dict[str, str], lease: str
    ) -> Blob:
        """Writes a small blob; one that is there already is kept, and gets the labels."""
        return self.write_stream(
            [data],
            ref=ref,
            media_type=media_type,
            labels=labels,
            lease=lease,
            limit_bytes=len(data),
        )

    def write_stream(
        self,
        pieces: Iterable[bytes],
        *,
        ref: str,
        media_type: str,
        labels: dict[str, str],
        lease: str,
        limit_bytes: int,
    ) -> Blob:
        """Writes what `pieces` give, counted and hashed on the way; `ref` is the writer's alone.

        Raises CallerError resource_exhausted beyond `limit_bytes`, and what `pieces` raises; then
        nothing of the blob is left.
        """
        writing = _Writing(pieces, ref, labels, limit_bytes)
        metadata = [
            ("containerd-namespace", self._containerd.namespace),
            ("containerd-lease", lease),
        ]
        try:
            for _ in self._content.Write(
                writing.requests(), metadata=metadata, timeout=LAYER_TIMEOUT_S
            ):
                pass
        except grpc.RpcError as error:
            self._abort(ref)
            if writing.failure is not None:
                raise writing.failure from error
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS or not writing.complete:
                raise translate(error, f"writing blob {ref}") from error
        if writing.failure is not None:
            self._abort(ref)
            raise writing.failure
        return Blob(digest=writing.digest, size=writing.size, media_type=media_type)

    def _abort(self, ref: str) -> None:
        request = content_pb2.AbortRequest(ref=ref)
        with contextlib.suppress(_Unknown):  # committed, or never begun
            self._call(self._content.Abort, request, f"dropping {ref}", absent=_Unknown)

    # Images.

    def put_image(self, name: str, manifest: Blob, labels: dict[str, str]) -> None:
        """Makes image `name`, or lets it name another manifest."""
        target = types_pb2.Descriptor(
            media_type=manifest.media_type, digest=manifest.digest, size=manifest.size
        )
        image = images_pb2.Image(name=name, target=target, labels=labels)
        try:
            request = images_pb2.CreateImageRequest(image=image)
            self._call(self._images.Create, request, f"making image {name}")
        except CallerError as error:
            if error.code != "already_exists":
                raise
            update = images_pb2.UpdateImageRequest(
                image=image, update_mask=FieldMask(paths=["target", "labels"])
            )
            self._call(self._images.Update, update, f"renewing image {name}")

    def touch_image(self, name: str, label: str, value: str) -> None:
        """Sets one label of an image; others stay."""
        request = images_pb2.UpdateImageRequest(
            image=images_pb2.Image(name=name, labels={label: value}),
            update_mask=FieldMask(paths=[f"labels.{label}"]),
        )
        self._call(self._images.Update, request, f"labelling image {name}")

    def find_image(self, name: str) -> images_pb2.Image | None:
        """The image of that name."""
        try:
            request = images_pb2.GetImageRequest(name=name)
            return self._call(self._images.Get, request, f"looking up image {name}").image
        except CallerError as error:
            if error.code != "not_found":
                raise
            return None

    def images(self, label: str) -> list[images_pb2.Image]:
        """The images that have a label of that name."""
        request = images_pb2.ListImagesRequest(filters=[f'labels."{label}"'])
        return list(self._call(self._images.List, request, "listing images").images)

    def remove_image(self, name: str) -> None:
        """Removes the name; what nothing else refers to is collected later. Unknown is fine."""
        with contextlib.suppress(_Unknown):
            request = images_pb2.DeleteImageRequest(name=name)
            self._call(self._images.Delete, request, f"removing image {name}", absent=_Unknown)

    # Unpacking.

    def unpack(
        self, layers: list[tuple[str, Blob]], chain_of: Callable[[list[str]], str], *, lease: str
    ) -> None:
        """Unpacks what is not unpacked yet; `layers` are (diff id, layer blob), lowest first.

        containerd does it, as for any image that it pulls: the tar is the guest's, and nothing
        here opens it.
        """
        parent = ""
        for count in range(1, len(layers) + 1):
            chain = chain_of([diff_id for diff_id, _ in layers[:count]])
            if not self._is_unpacked(chain):
                self._unpack_one(layers[count - 1][1], chain, parent, lease)
            parent = chain

    def _is_unpacked(self, chain: str) -> bool:
        request = snapshots_pb2.StatSnapshotRequest(
            snapshotter=self._containerd.snapshotter, key=chain
        )
        try:
            self._call(self._snapshots.Stat, request, f"looking up snapshot {chain}")
        except CallerError as error:
            if error.code != "not_found":
                raise
            return False
        return True

    def _unpack_one(self, layer: Blob, chain: str, parent: str, lease: str) -> None:
        snapshotter = self._containerd.snapshotter
        digest = hashlib.sha256(f"{lease} {chain}".encode()).hexdigest()
        key = f"vmcell-unpack-{digest[:32]}"
        self._containerd.remove_snapshot(key)  # of a noded that died here
        mounts = self._containerd.prepare_snapshot(key, parent=parent, labels={}, lease=lease)
        try:
            diff = types_pb2.Descriptor(
                media_type=layer.media_type, digest=layer.digest, size=layer.size
            )
            self._call(
                self._diff.Apply,
                diff_pb2.ApplyRequest(diff=diff, mounts=mounts),
                f"unpacking layer {layer.digest}",
                lease=lease,
                timeout_s=LAYER_TIMEOUT_S,
            )
            request = snapshots_pb2.CommitSnapshotRequest(
                snapshotter=snapshotter, name=chain, key=key
            )
            self._call(self._snapshots.Commit, request, f"keeping snapshot {chain}", lease=lease)
        except CallerError as error:
            self._containerd.remove_snapshot(key)
            if error.code != "already_exists":
                raise
        except HostError:
            self._containerd.remove_snapshot(key)
            raise

    def _call(
        self,
        method: Callable,
        request: object,
        tried: str,
        *,
        lease: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
        absent: type[CallerError] | None = None,
    ) -> typing.Any:
        try:
            return self._containerd.call(method, request, tried, lease=lease, timeout_s=timeout_s)
        except CallerError as error:
            if absent is not None and error.code == "not_found":
                raise absent(str(error)) from error
            raise


class _Unknown(CallerError):
    """What should be removed is not there."""


class _Writing:
    """The requests of one write; afterwards `digest`, `size`, and whether all was sent."""

    def __init__(
        self, pieces: Iterable[bytes], ref: str, labels: dict[str, str], limit_bytes: int
    ) -> None:
        self._pieces = pieces
        self._ref = ref
        self._labels = labels
        self._limit_bytes = limit_bytes
        self.size = 0
        self.digest = ""
        self.complete = False
        self.failure: Exception | None = None

    def requests(self) -> Iterator[content_pb2.WriteContentRequest]:
        """gRPC takes them in a thread of its own: what goes wrong is kept for the caller, and the
        stream ends without a commit."""
        try:
            yield from self._requests()
        except Exception as error:  # noqa: BLE001 - raised again by write_stream
            self.failure = error

    def _requests(self) -> Iterator[content_pb2.WriteContentRequest]:
        hashed = hashlib.sha256()
        for piece in self._pieces:
            for start in range(0, len(piece), PIECE_BYTES):
                data = piece[start : start + PIECE_BYTES]
                if self.size + len(data) > self._limit_bytes:
                    raise CallerError(
                        f"what the step wrote is more than {self._limit_bytes >> 20} MiB; "
                        "write less, or remove what is not needed in the same step",
                        code="resource_exhausted",
                    )
                hashed.update(data)
                yield content_pb2.WriteContentRequest(
                    action=content_pb2.WRITE, ref=self._ref, offset=self.size, data=data
                )
                self.size += len(data)
        self.digest = "sha256:" + hashed.hexdigest()
        self.complete = True
        yield content_pb2.WriteContentRequest(
            action=content_pb2.COMMIT,
            ref=self._ref,
            offset=self.size,
            total=self.size,
            expected=self.digest,
            labels=self._labels,
        )
