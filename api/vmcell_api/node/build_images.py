"""The images a build starts from, keeps after each step, and ends with.

A step's outcome is an image `vmcell.local/cache/<key>` of containerd's, the finished template
`vmcell.local/build/<build id>`; both are images like any other, so containerd's garbage collector,
its unpacking and the shim's image cache need to know nothing of builds. The cache is bounded by
count; the least recently used go first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from vmcell_api.node import image_json, image_pull, oci_image
from vmcell_api.node.blob_store import GC_CONTENT, GC_SNAPSHOT, Blob, BlobStore
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.image_json import ImageState
from vmcell_api.node.image_pull import OWN_REGISTRY, RegistryLogin
from vmcell_protos.errors import CallerError

CACHE, BUILD = f"{OWN_REGISTRY}cache/", f"{OWN_REGISTRY}build/"
CACHED_LABEL, USED_LABEL = "io.vmcell.build-cache", "io.vmcell.used-at"
LEASE_PREFIX = "vmcell-build-"
LEASE_LIFE_S = 24 * 3600
_EMPTY_TAR_BYTES = 1024


class BuildImages:
    """Thread-safe; the connection stays the caller's. `cache_limit`: how many steps are kept."""

    def __init__(self, containerd: Containerd, socket_path: str, *, cache_limit: int) -> None:
        self._containerd = containerd
        self._blobs = BlobStore(containerd)
        self._socket_path = socket_path
        self._cache_limit = cache_limit

    @contextlib.contextmanager
    def lease(self, build_id: str) -> Iterator[str]:
        """Keeps what is written in the block from the garbage collector; ends by itself too."""
        lease = LEASE_PREFIX + build_id
        expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + LEASE_LIFE_S))
        self._containerd.create_lease(lease, {"containerd.io/gc.expire": expiry})
        try:
            yield lease
        finally:
            self._containerd.delete_lease(lease)

    def drop_leases(self) -> None:
        """Gives back what builds of an earlier noded held."""
        for lease in self._containerd.lease_ids():
            if lease.startswith(LEASE_PREFIX):
                self._containerd.delete_lease(lease)

    def base(
        self, reference: str, login: RegistryLogin | None, cancelled: Callable[[], bool]
    ) -> tuple[str, ImageState]:
        """The manifest's digest and the state of an image, which is pulled when it is not here."""
        if self._blobs.find_image(reference) is None:
            image_pull.pull(
                reference,
                login,
                socket_path=self._socket_path,
                namespace=self._containerd.namespace,
                snapshotter=self._containerd.snapshotter,
                cancelled=cancelled,
            )
        return self._read(reference)

    def is_here(self, reference: str) -> bool:
        """Whether containerd has an image of that name."""
        return self._blobs.find_image(reference) is not None

    def _read(self, name: str) -> tuple[str, ImageState]:
        target = self._containerd.image_target(name)
        digest = target.digest
        if target.media_type in oci_image.INDEX_TYPES:
            digest = oci_image.manifest_digest(self._containerd.read_blob(digest), name)
        manifest = self._containerd.read_blob(digest)
        config = self._containerd.read_blob(oci_image.config_digest(manifest, name))
        return digest, image_json.read_state(manifest, config, name)

    def cached(self, key: str) -> ImageState | None:
        """The state that an earlier build has kept under `key`; that counts as a use."""
        name = CACHE + key
        if self._blobs.find_image(name) is None:
            return None
        try:
            _, state = self._read(name)
            self._blobs.touch_image(name, USED_LABEL, str(time.time_ns()))
        except CallerError as error:
            if error.code != "not_found":
                raise
            return None  # another build's pruning came between
        return state

    def keep(self, key: str, team_id: str, state: ImageState, lease: str) -> str:
        """Keeps the state under `key`; answers the image's name."""
        labels = {CACHED_LABEL: team_id, USED_LABEL: str(time.time_ns())}
        return self._write(CACHE + key, state, labels, lease)

    def publish(self, build_id: str, state: ImageState, lease: str) -> str:
        """Unpacks the state and gives it the build's name, which is answered."""
        self.unpack(state, lease)
        return self._write(BUILD + build_id, state, {}, lease)

    def forget(self, build_id: str) -> None:
        """Removes a build's image; an unknown one is fine."""
        self._blobs.remove_image(BUILD + build_id)

    def add_layer(
        self, state: ImageState, pieces: Iterator[bytes], ref: str, lease: str, limit_bytes: int
    ) -> ImageState:
        """The state with what `pieces` hold as a layer, or the same when they hold nothing."""
        blob = self._blobs.write_stream(
            pieces,
            ref=ref,
            media_type=image_json.LAYER_TYPE,
            labels={},
            lease=lease,
            limit_bytes=limit_bytes,
        )
        return state if blob.size <= _EMPTY_TAR_BYTES else state.with_layer(blob)

    def unpack(self, state: ImageState, lease: str) -> None:
        """Makes sure that every layer is unpacked for the snapshotter."""
        self._blobs.unpack(list(state.layers), oci_image.chain_id, lease=lease)

    def prune(self) -> int:
        """Removes the steps over the limit, the least recently used first; answers how many."""
        images = self._blobs.images(CACHED_LABEL)
        images.sort(key=lambda image: int(image.labels.get(USED_LABEL) or 0))
        surplus = images[: max(0, len(images) - self._cache_limit)]
        for image in surplus:
            self._blobs.remove_image(image.name)
        return len(surplus)

    def _write(self, name: str, state: ImageState, labels: dict[str, str], lease: str) -> str:
        chain = oci_image.chain_id(state.diff_ids())
        config = self._put(
            image_json.write_config(state),
            image_json.CONFIG_TYPE,
            {GC_SNAPSHOT + self._containerd.snapshotter: chain},
            lease,
        )
        referred = [config, *(blob for _, blob in state.layers)]
        manifest = self._put(
            image_json.write_manifest(state, config),
            image_json.MANIFEST_TYPE,
            {f"{GC_CONTENT}{number}": blob.digest for number, blob in enumerate(referred)},
            lease,
        )
        self._blobs.put_image(name, manifest, labels)
        return name

    def _put(self, data: bytes, media_type: str, labels: dict[str, str], lease: str) -> Blob:
        ref = f"{lease}-{time.time_ns()}"
        return self._blobs.write_bytes(
            data, ref=ref, media_type=media_type, labels=labels, lease=lease
        )
