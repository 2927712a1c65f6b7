"""One build, from its base image to a finished one: which steps are cached, and doing the others.

All that is done is done in one microVM: after each step that may have written something, the guest
gives what changed as a layer (`guest_process.layer`), and the image with it goes into the cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol

from vmcell_api.node import build_steps, start_command
from vmcell_api.node.build_images import CACHE, BuildImages
from vmcell_api.node.build_records import BuildRecord, LineSplitter
from vmcell_api.node.build_steps import BASE, FINALIZE, Step
from vmcell_api.node.guest_process import Command, CommandRefused, GuestProcesses
from vmcell_api.node.image_json import ImageState
from vmcell_api.node.image_pull import RegistryLogin
from vmcell_api.node.upload_files import Upload
from vmcell_protos.errors import CallerError, HostError, VmcellError

STANDARD_USER, STANDARD_WORKDIR = "user", "/home/user"
# Where a COPY's files lie for the moment, in the guest.
COPY_FOLDER = "/.vmcell-copy"
TAIL_LINES = 12


class StepFailed(Exception):
    """A step could not be done; `step` is its name in E2B's reason, the words are the user's."""

    def __init__(self, step: str, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What is to be built; `steps` have been checked."""

    build_id: str
    team_id: str
    template_id: str
    from_image: str
    login: RegistryLogin | None = None
    steps: tuple[Step, ...] = ()
    force: bool = False
    start_command: str = ""
    ready_command: str = ""
    vcpus: int = 1
    memory_mib: int = 512


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished build's image and the defaults of commands in it."""

    image: str
    default_user: str
    default_workdir: str


class Machines(Protocol):
    """Where build sandboxes come from."""

    def boot(self, request: BuildRequest, image: str) -> GuestProcesses:
        """A sandbox of `image` whose envd gives layers; `end` is the caller's in any case."""

    def end(self) -> None:
        """Removes it; none is fine."""


@dataclass
class BuildRun:
    """Runs once; `cancelled` ends it at the next step. Raises StepFailed."""

    request: BuildRequest
    record: BuildRecord
    images: BuildImages
    machines: Machines
    open_upload: Callable[[str, str], Upload]
    deadline: float
    layer_limit_bytes: int
    cancelled: threading.Event = field(default_factory=threading.Event)
    _guest: GuestProcesses | None = None
    _layers: int = 0

    def run(self) -> Outcome:
        """Builds; the image's name and defaults when it is done."""
        with ExitStack() as stack:
            lease = self._tried(
                BASE, lambda: stack.enter_context(self.images.lease(self.request.build_id))
            )
            stack.callback(self.machines.end)
            self._check_cancelled(BASE)
            return self._build(lease)

    def _build(self, lease: str) -> Outcome:
        request = self.request
        name, key, state = self._base(lease)
        total, done = len(request.steps), 0
        use_cache = not request.force
        for number, step in enumerate(request.steps, start=1):
            following = build_steps.next_key(key, step)
            use_cache = use_cache and not step.force
            cached = (
                self._tried(str(number), lambda k=following: self.images.cached(k))
                if (use_cache)
                else None
            )
            if cached is None:
                break
            self._log(f"[{number}/{total}] CACHED {step.words()}", str(number))
            key, state, done, name = following, cached, number, _cache_name(following)
        for number, step in enumerate(request.steps[done:], start=done + 1):
            self._check_cancelled(str(number))
            self._log(f"[{number}/{total}] {step.words()}", str(number))
            self._need_guest(name, state, str(number), lease)
            state = self._tried(str(number), lambda s=state, n=number: self._do(s, n, lease))
            key = build_steps.next_key(key, step)
            self._tried(
                str(number),
                lambda k=key, s=state: self.images.keep(k, request.team_id, s, lease),
            )
        return self._finish(name, key, state, lease, tried_before=use_cache and done == total)

    def _base(self, lease: str) -> tuple[str, str, ImageState]:
        """The image below the first step: the one asked for, with the user that E2B promises."""
        request, images = self.request, self.images
        self._log(f"FROM {request.from_image}", BASE)
        if not self._tried(BASE, lambda: images.is_here(request.from_image)):
            self._log(f"pulling {request.from_image}", BASE)
        digest, state = self._tried(
            BASE, lambda: images.base(request.from_image, request.login, self.cancelled.is_set)
        )
        state = replace(
            state, user=_plain_user(state.user), workdir=state.workdir or STANDARD_WORKDIR
        )
        key = build_steps.first_key(request.team_id, digest)
        cached = None if request.force else self._tried(BASE, lambda: images.cached(key))
        if cached is None:
            self._check_cancelled(BASE)
            self._need_guest(request.from_image, state, BASE, lease)
            command = Command(text=build_steps.make_user_script())
            self._tried(BASE, lambda: self._run_plainly(command, BASE))
            cached = self._tried(BASE, lambda: self._with_layer(state, lease))
            self._tried(BASE, lambda: images.keep(key, request.team_id, cached, lease))
        return _cache_name(key), key, cached

    def _finish(
        self, name: str, key: str, state: ImageState, lease: str, *, tried_before: bool
    ) -> Outcome:
        """The start and ready commands are tried once, then the image gets its name."""
        request = self.request
        last = build_steps.last_key(key, request.start_command, request.ready_command)
        known = tried_before and self._tried(FINALIZE, lambda: self.images.cached(last)) is not None
        if (request.start_command or request.ready_command) and not known:
            self._check_cancelled(FINALIZE)
            self._need_guest(name, state, FINALIZE, lease)
            self._tried(FINALIZE, lambda: self._try_start(state))
            self._tried(FINALIZE, lambda: self.images.keep(last, request.team_id, state, lease))
        self._check_cancelled(FINALIZE)
        self._log("writing the image", FINALIZE)
        image = self._tried(FINALIZE, lambda: self.images.publish(request.build_id, state, lease))
        return Outcome(image=image, default_user=state.user, default_workdir=state.workdir)

    # The steps.

    def _do(self, state: ImageState, number: int, lease: str) -> ImageState:
        step = self.request.steps[number - 1]
        if step.type == "ENV":
            return self._set_environment(state, step, str(number))
        if step.type == "USER":
            # The account must exist; the words for one that does not are those of RUN.
            self._run(Command(text="whoami", user=step.args[0]), str(number))
            return replace(state, user=step.args[0])
        if step.type == "WORKDIR":
            path = build_steps.absolute(step.args[0], state.workdir).rstrip("/") or "/"
            script = build_steps.workdir_script(path, state.user)
            self._run_plainly(Command(text=script), str(number))
            return self._with_layer(replace(state, workdir=path), lease)
        if step.type == "COPY":
            self._copy(state, step, str(number))
        else:
            user = step.argument(1) or state.user
            self._run(self._command(state, step.args[0], user), str(number))
        return self._with_layer(state, lease)

    def _set_environment(self, state: ImageState, step: Step, name: str) -> ImageState:
        values = dict(zip(step.args[::2], step.args[1::2], strict=True))
        for key, value in values.items():
            if "$" in value:
                printed = bytearray()
                script = self._command(state, build_steps.value_script(value), state.user)
                self._run_plainly(script, name, printed)
                values[key] = printed.decode("utf-8", "replace")
        return replace(state, environment={**state.environment, **values})

    def _copy(self, state: ImageState, step: Step, name: str) -> None:
        upload = self.open_upload(self.request.team_id, step.files_hash)
        clean = Command(text=f"rm -rf {COPY_FOLDER}")
        try:
            self._run_plainly(clean, name)
            path = f"{COPY_FOLDER}/files"
            self._machine.upload(path, upload.file, upload.size, deadline=self.deadline)
        finally:
            upload.file.close()
        script = build_steps.copy_script(
            step, folder=COPY_FOLDER, packed=upload.packed, user=state.user, workdir=state.workdir
        )
        self._run_plainly(Command(text=script), name)
        self._run_plainly(clean, name)

    def _try_start(self, state: ImageState) -> None:
        request = self.request
        ended = threading.Event()
        if request.start_command:
            self._log(f"start command: {request.start_command}", FINALIZE)
            command = self._command(state, request.start_command, state.user)
            threading.Thread(
                target=self._follow_start, args=(command, ended), name="start", daemon=True
            ).start()
        if request.ready_command:
            self._log(f"ready command: {request.ready_command}", FINALIZE)
            ready = self._command(state, request.ready_command, state.user)
            start_command.wait_ready(self._machine, ready, deadline=self.deadline, failed=ended)

    def _follow_start(self, command: Command, ended: threading.Event) -> None:
        """Its output goes into the log for as long as the machine is there."""
        try:
            status = self._logged_run(command, FINALIZE)
        except CommandRefused as error:
            self._log(f"start command: {error}", FINALIZE, "error")
            ended.set()
        except (VmcellError, ValueError):
            return  # the machine has gone, as it does at the end of each build
        else:
            self._log(f"the start command ended with {status}", FINALIZE, "warn")
            if status:
                ended.set()

    # Commands.

    def _command(self, state: ImageState, text: str, user: str) -> Command:
        return Command(text=text, user=user, workdir=state.workdir, environment=state.environment)

    def _run(self, command: Command, step: str) -> None:
        """A command of the user's; its failure carries its own last lines."""
        lines: list[str] = []
        try:
            status = self._logged_run(command, step, lines)
        except CommandRefused as error:
            raise StepFailed(
                step, f"failed to run command '{command.text}': command failed: {error}"
            ) from error
        if status:
            output = "\n".join(lines[-TAIL_LINES:])
            raise StepFailed(
                step,
                f"failed to run command '{command.text}': exit status {status}"
                + (f"\n{output}" if output else ""),
            )

    def _run_plainly(self, command: Command, step: str, printed: bytearray | None = None) -> None:
        """A script of ours: its output is of interest when it fails, or is what `printed` gets."""
        words = bytearray()

        def take(kind: str, data: bytes) -> None:
            words.extend(data[: max(0, 4096 - len(words))])
            if printed is not None and kind == "stdout":
                printed.extend(data)

        status = self._machine.run(command, deadline=self.deadline, on_output=take)
        if status:
            text = words.decode("utf-8", "replace").strip()
            raise StepFailed(step, f"exit status {status}: {text}")

    def _logged_run(self, command: Command, step: str, lines: list[str] | None = None) -> int:
        kept = [] if lines is None else lines

        def splitter(level: str) -> LineSplitter:
            def tell(line: str) -> None:
                kept.append(line)
                del kept[:-TAIL_LINES]
                self._log(line, step, level)

            return LineSplitter(tell)

        outputs = {"stdout": splitter("info"), "stderr": splitter("warn")}
        status = self._machine.run(
            command,
            deadline=self.deadline,
            on_output=lambda kind, data: outputs[kind].feed(data),
        )
        for output in outputs.values():
            output.finish()
        return status

    def _with_layer(self, state: ImageState, lease: str) -> ImageState:
        self._layers += 1
        ref = f"{lease}-layer-{self._layers}"
        with self._machine.layer(deadline=self.deadline) as pieces:
            return self.images.add_layer(state, pieces, ref, lease, self.layer_limit_bytes)

    # Around them.

    @property
    def _machine(self) -> GuestProcesses:
        if self._guest is None:
            raise HostError("the build's machine is not there", code="internal")
        return self._guest

    def _need_guest(self, image: str, state: ImageState, step: str, lease: str) -> None:
        if self._guest is None:
            self._log("starting the build's microVM", step, "debug")
            self._tried(step, lambda: self.images.unpack(state, lease))
            self._guest = self._tried(step, lambda: self.machines.boot(self.request, image))
            self._check_cancelled(step)

    def _tried(self, step: str, call: Callable):  # type: ignore[no-untyped-def]  # any result
        """Our errors as failures of the step, in words for the user."""
        try:
            return call()
        except StepFailed as error:
            if self.cancelled.is_set():
                raise StepFailed(step, "the build was cancelled") from error
            raise
        except VmcellError as error:
            if self.cancelled.is_set():
                raise StepFailed(step, "the build was cancelled") from error
            if time.monotonic() > self.deadline:
                raise StepFailed(step, "the build took longer than it may") from error
            raise StepFailed(step, str(error)) from error

    def _check_cancelled(self, step: str) -> None:
        if self.cancelled.is_set():
            raise StepFailed(step, "the build was cancelled")

    def _log(self, message: str, step: str, level: str = "info") -> None:
        self.record.log(level, message, step)


def _cache_name(key: str) -> str:
    return CACHE + key


def _plain_user(user: str) -> str:
    """The image's user where it is a name; numbers name nobody in E2B's data plane."""
    name = user.partition(":")[0]
    if name == "0":
        return "root"
    return STANDARD_USER if not name or name.isdigit() else name


def check_request(request: BuildRequest) -> None:
    """Raises CallerError for what cannot be built."""
    build_steps.check_steps(list(request.steps))
    for name in ("start_command", "ready_command"):
        value = getattr(request, name)
        if len(value) > build_steps.MAX_ARGUMENT_CHARACTERS or "\0" in value:
            raise CallerError(f"{name} is longer than may be, or has a NUL")
