"""OCI hooks that run in the runtime's namespace; nerdctl makes its networks with them.

Each gets the container's state as JSON on stdin. What a hook prints goes into the error when it
fails. Source: OCI runtime-spec config.md § POSIX-platform Hooks, runtime.md § State, § Lifecycle.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.netns import NERDCTL_ANNOTATION
from vmcell_shim.oci_json import take, take_rows, take_strings
from vmcell_shim.spawn import run_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

# Points of the life cycle, in order.
PRESTART, CREATE_RUNTIME = "prestart", "createRuntime"
POSTSTART, POSTSTOP = "poststart", "poststop"
CREATING, RUNNING, STOPPED = "creating", "running", "stopped"

_POINTS = (PRESTART, CREATE_RUNTIME, POSTSTART, POSTSTOP)
_STATUS = {PRESTART: CREATING, CREATE_RUNTIME: CREATING, POSTSTART: RUNNING, POSTSTOP: STOPPED}
# The specification knows no default; a hook that hangs would hang whoever asked.
_DEFAULT_TIMEOUT_S = 30
_TOLD_CHARACTERS = 1000
_KILLED_STATUS = 137


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One program; `args` with its own name first, `env` as "NAME=value" and nothing else."""

    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class HookState:
    """What of the OCI state does not change during the container's life."""

    oci_version: str
    id: str
    bundle: str
    annotations: dict[str, str]


def parse_hooks(spec: Json) -> dict[str, tuple[Hook, ...]]:
    """The hooks of a spec by their point; CallerError for one that cannot be run."""
    found: dict[str, tuple[Hook, ...]] = {}
    for point in take(spec, "hooks", dict, {}):
        rows = take_rows(spec, f"hooks.{point}")
        if rows and point not in _POINTS:
            raise CallerError(
                f"config.json has hooks.{point}, to be run inside the container; "
                f"a microVM's host cannot. It runs {', '.join(_POINTS)}",
                code="unimplemented",
            )
        found[point] = tuple(_parse_hook(row, f"hooks.{point}[{n}]") for n, row in enumerate(rows))
    return found


def hook_state(spec: Json, container_id: str, bundle: str, namespace: str) -> HookState:
    """The state for a spec's hooks. `namespace` is the path of the container's network namespace,
    "" for none; nerdctl's hook makes the network there, and not where the pid lives."""
    annotations = dict(take(spec, "annotations", dict, {}))
    if namespace:
        annotations[NERDCTL_ANNOTATION] = namespace
    return HookState(
        oci_version=take(spec, "ociVersion", str, ""),
        id=container_id,
        bundle=bundle,
        annotations=annotations,
    )


def run_hooks(
    point: str, hooks: dict[str, tuple[Hook, ...]], state: HookState, *, pid: int
) -> None:
    """Runs the hooks of one point in order; HostError by the first that fails.

    `pid` is the process to be reported for the container, 0 for none yet.
    """
    text = _state_json(state, _STATUS[point], pid)
    for number, hook in enumerate(hooks.get(point, ())):
        _run(hook, f"{point}[{number}]", text, hook.timeout_s)


def poststop_record(hooks: dict[str, tuple[Hook, ...]], state: HookState) -> Json:
    """What run_poststop() needs, as JSON for the state file; to be written before the first hook
    runs, and removed when poststop has run."""
    rows = [asdict(hook) for hook in hooks.get(POSTSTOP, ())]
    return {"hooks": rows, "state": asdict(state)} if rows else {}


def run_poststop(record: Json, *, within_s: float) -> list[str]:
    """Runs every hook of a record, in `within_s` altogether; one sentence for each that failed.

    Poststop hooks undo things, so the others run when one fails (runtime.md § Lifecycle). Raises
    HostError for a damaged record.
    """
    if not record:
        return []
    try:
        state = HookState(**record["state"])
        hooks = [Hook(**row) for row in record["hooks"]]
    except (KeyError, TypeError) as error:
        raise HostError(f"the record of poststop hooks is damaged: {error!r}") from error
    until = time.monotonic() + within_s
    text = _state_json(state, STOPPED, 0)
    failures = []
    for number, hook in enumerate(hooks):
        left_s = max(0.0, until - time.monotonic())
        try:
            _run(hook, f"{POSTSTOP}[{number}]", text, min(hook.timeout_s, left_s))
        except HostError as error:
            failures.append(str(error))
    return failures


def _parse_hook(row: Json, where: str) -> Hook:
    path = take(row, "path", str, "")
    args, env = take_strings(row, "args"), take_strings(row, "env")
    timeout_s = take(row, "timeout", int, _DEFAULT_TIMEOUT_S)
    if not path.startswith("/"):
        raise CallerError(f"config.json: {where}.path is {path!r}; it must be an absolute path")
    for entry in env:
        if "=" not in entry[1:]:
            raise CallerError(
                f"config.json: {where}.env holds {entry[:60]!r}, which is no NAME=value"
            )
    if timeout_s <= 0:
        raise CallerError(
            f"config.json: {where}.timeout is {timeout_s}; it must be above 0 seconds"
        )
    return Hook(path=path, args=tuple(args or [path]), env=tuple(env), timeout_s=timeout_s)


def _state_json(state: HookState, status: str, pid: int) -> bytes:
    value: Json = {
        "ociVersion": state.oci_version,
        "id": state.id,
        "status": status,
        "bundle": state.bundle,
        "annotations": state.annotations,
    }
    if pid:
        value["pid"] = pid
    return json.dumps(value).encode()


def _run(hook: Hook, name: str, state: bytes, timeout_s: float) -> None:
    env = dict(entry.split("=", 1) for entry in hook.env)
    started = time.monotonic()
    try:
        status, output = run_program(
            list(hook.args), path=hook.path, env=env, stdin=state, timeout_s=timeout_s
        )
    except OSError as error:
        raise HostError(f"hook {name} {hook.path} cannot be run: {error.strerror}") from error
    if status == 0:
        return
    reason = f"failed with status {status}"
    if status == _KILLED_STATUS and time.monotonic() - started >= timeout_s:
        reason = f"did not end within {timeout_s:g} s and was killed"
    printable = "".join(c if c.isprintable() else " " for c in output[-_TOLD_CHARACTERS:]).strip()
    raise HostError(f"hook {name} {hook.path} {reason}" + (f": {printable}" if printable else ""))
