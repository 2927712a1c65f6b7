"""What one container has beside its processes: on the host files, images and copies kept fresh, in
the guest devices and shares. Taken in Create, given back in Delete or by a Create that failed.
"""

from __future__ import annotations

from vmcell_protos.agent import (
    ContainerRef,
    CopyFilesRequest,
    FileCopy,
    ProcessRef,
    ReadFileRequest,
    ReadFileResponse,
)
from vmcell_protos.errors import CallerError, GuestError, VmcellError
from vmcell_protos.wellknown import Empty
from vmcell_shim.binds import FILE_LIMIT_BYTES
from vmcell_shim.client import ConnectionLost
from vmcell_shim.refresh import Refresh
from vmcell_shim.rootfs import MAX_LOWERS, prepare_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.journal import Journal
    from vmcell_shim.rootfs import RootImages, RootSource
    from vmcell_shim.sandbox import RootDevices, Sandbox
    from vmcell_shim.sandbox_files import SandboxFiles
    from vmcell_shim.saved_container import SavedRoot
    from vmcell_shim.spec import GuestPlan

# containerd's CRI gives Kill and Delete ten seconds together.
_REMOVE_ANSWER_S = 6.0
_COPY_ANSWER_S = 10.0
# Windows of a pod's VM are few; what has more layers is merged into one image.
MAX_POD_LOWERS = 2
_READ_BACK_ANSWER_S = 2.0


class Footprint:
    """Owns the container's directory and what it took from its sandbox until release()."""

    def __init__(
        self,
        container_id: str,
        *,
        sandbox: Sandbox,
        config: ShimConfig,
        files: SandboxFiles,
        own_dir: str,
        journal: Journal,
    ) -> None:
        self._id = container_id
        self._sandbox = sandbox
        self._guest = sandbox.guest
        self._config = config
        self._files = files
        self._own_dir = own_dir
        self._journal = journal
        self._refresh: Refresh | None = None
        self._shares: list[int] = []
        self._images: RootImages | None = None
        self._devices: RootDevices | None = None

    def open(self, bundle: str) -> None:
        """The directory that `delete` finds, with everything that is to go. Raises HostError."""
        self._files.log_dir = self._config.log_dir
        self._files.owned = [self._own_dir]
        if self._files is not self._sandbox.files:
            self._files.sandbox = self._sandbox.files.directory
            self._sandbox.files.add_member(self._id, self._files.directory)
        self._files.create(bundle)

    def images(self, source: RootSource, saved: SavedRoot | None) -> RootImages:
        """The root's images and disk, made where they are missing. Raises VmcellError."""
        self._images = prepare_root(
            source,
            cache_dir=self._config.cache_dir,
            own_dir=self._own_dir,
            writable_mib=self._config.writable_mib,
            cache_limit_mib=self._config.cache_limit_mib,
            max_lowers=MAX_POD_LOWERS if self._sandbox.is_pod else MAX_LOWERS,
            saved=saved,
        )
        return self._images

    def attach(self, images: RootImages, plan: GuestPlan) -> RootDevices:
        """Brings devices and shares into the guest; completes the plan's spec with the shares'
        numbers. Raises VmcellError."""
        for live in plan.shares:
            number = self._sandbox.share(
                live.share.source,
                read_only=live.share.read_only,
                follow=live.share.follows_host,
            )
            self._shares.append(number)
            live.mount["source"] = str(number)
        self._refresh = Refresh(list(plan.copies), self._push)
        self._devices = self._sandbox.attach(images)
        return self._devices

    def keep_fresh(self) -> None:
        """From here on changes of copied files reach the guest."""
        if self._refresh is not None:
            self._refresh.start()

    def _push(self, files: list[FileCopy]) -> None:
        request = CopyFilesRequest(container_id=self._id, files=files)
        try:
            self._guest.call("CopyFiles", request, Empty, _COPY_ANSWER_S)
        except ConnectionLost:
            return
        except VmcellError as error:
            names = ", ".join(file.destination for file in files)
            self._journal.warning(f"{names} of {self._id} not refreshed: {error}")

    def write_back(self) -> None:
        """What the container wrote into copied files reaches their sources, once it has ended."""
        if self._refresh is None or self._guest.ended.is_set():
            return
        try:
            self._refresh.write_back(self._read)
        except (OSError, VmcellError) as error:
            self._journal.warning(f"files of {self._id} not written back: {error}")

    def _read(self, path: str) -> bytes | None:
        request = ReadFileRequest(container_id=self._id, path=path, limit_bytes=FILE_LIMIT_BYTES)
        try:
            answer = self._guest.call("ReadFile", request, ReadFileResponse, _READ_BACK_ANSWER_S)
        except CallerError as error:
            if error.code != "not_found":
                raise
            return None
        if len(answer.content) > FILE_LIMIT_BYTES:
            raise GuestError(
                f"{path} came back with {len(answer.content)} bytes; at most {FILE_LIMIT_BYTES} "
                "were asked for"
            )
        return answer.content

    def leave_guest(self) -> None:
        """The container's part of a guest that goes on without it. Raises VmcellError."""
        if self._refresh is not None:
            self._refresh.close()
        if not self._sandbox.is_pod or self._guest.ended.is_set():
            return
        try:
            ref = ProcessRef(container_id=self._id)
            self._guest.call("DeleteProcess", ref, Empty, _REMOVE_ANSWER_S)
        except (CallerError, ConnectionLost) as error:
            # Never made there, or gone with its VM.
            self._journal.info(f"guest on removing {self._id}: {error}")
        if self._devices is not None:
            self._sandbox.detach(self._devices.plugged)
            self._devices = None
        for number in self._shares:
            self._sandbox.unshare(number)
        self._shares.clear()

    def release(self) -> None:
        """What it has on the host goes; alone in its sandbox, that goes too. HostError."""
        if self._refresh is not None:
            self._refresh.close()
        try:
            if self._files is self._sandbox.files:
                self._sandbox.close()
            else:
                self._files.remove()
                self._sandbox.files.drop_member(self._id)
        finally:
            if self._images is not None:
                self._images.close()

    def ref(self) -> ContainerRef:
        """The container as the guest's agent knows it."""
        return ContainerRef(container_id=self._id)
