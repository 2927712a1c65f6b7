"""`process` of an OCI runtime spec (config.md, "Process") as one immutable description.

Fields whose absence would weaken what was asked for (scheduler, I/O priority, CPU affinity) are
refused by name. AppArmor and SELinux labels speak of the host's kernel and are ignored.
"""

from __future__ import annotations

import resource

from vmcell_agent import capabilities
from vmcell_agent.capabilities import CapabilitySets
from vmcell_agent.record import Record
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_agent.jsonfields import Object

RLIMITS = {
    "RLIMIT_AS": resource.RLIMIT_AS,
    "RLIMIT_CORE": resource.RLIMIT_CORE,
    "RLIMIT_CPU": resource.RLIMIT_CPU,
    "RLIMIT_DATA": resource.RLIMIT_DATA,
    "RLIMIT_FSIZE": resource.RLIMIT_FSIZE,
    "RLIMIT_LOCKS": 10,  # <asm-generic/resource.h>; the module does not name it
    "RLIMIT_MEMLOCK": resource.RLIMIT_MEMLOCK,
    "RLIMIT_MSGQUEUE": resource.RLIMIT_MSGQUEUE,
    "RLIMIT_NICE": resource.RLIMIT_NICE,
    "RLIMIT_NOFILE": resource.RLIMIT_NOFILE,
    "RLIMIT_NPROC": resource.RLIMIT_NPROC,
    "RLIMIT_RSS": resource.RLIMIT_RSS,
    "RLIMIT_RTPRIO": resource.RLIMIT_RTPRIO,
    "RLIMIT_RTTIME": 15,
    "RLIMIT_SIGPENDING": resource.RLIMIT_SIGPENDING,
    "RLIMIT_STACK": resource.RLIMIT_STACK,
}
_U64 = (1 << 64) - 1
MAX_ID = (1 << 31) - 1
_REFUSED = ("scheduler", "ioPriority", "execCPUAffinity")


class Rlimit(Record):
    """One limit by the kernel's number; RLIM_INFINITY is resource's -1."""

    name: str
    number: int
    soft: int
    hard: int


class ProcessSpec(Record):
    """What a process is to be: program, credentials, limits."""

    args: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    additional_gids: tuple[int, ...]
    umask: int | None
    capabilities: CapabilitySets
    rlimits: tuple[Rlimit, ...]
    no_new_privileges: bool
    oom_score_adj: int | None  # None: the agent's own (-1000)
    rows: int  # of the terminal; 0: not said
    columns: int


def parse_process(process: Object, *, needs_args: bool = True) -> ProcessSpec:
    """The description in `process`; raises CallerError with the field's name."""
    for key in _REFUSED:
        if process.has(key):
            raise CallerError(f"{process.path}.{key} is not supported")
    args = tuple(process.texts("args"))
    if needs_args and not args:
        raise CallerError(f"{process.path}.args is empty; name the program to run")
    cwd = process.text("cwd", "/")
    if not cwd.startswith("/"):
        raise CallerError(f"{process.path}.cwd is {cwd!r}; it must be absolute")
    user = process.object("user")
    size = process.object("consoleSize")
    return ProcessSpec(
        args=args,
        env=_environment(process),
        cwd=cwd,
        uid=user.number("uid", 0, MAX_ID) or 0,
        gid=user.number("gid", 0, MAX_ID) or 0,
        additional_gids=tuple(user.numbers("additionalGids", 0, MAX_ID)),
        umask=user.number("umask", 0, 0o777),
        capabilities=_capability_sets(process.object("capabilities")),
        rlimits=tuple(_rlimit(row) for row in process.objects("rlimits")),
        no_new_privileges=process.flag("noNewPrivileges"),
        oom_score_adj=process.number("oomScoreAdj", -1000, 1000) or 0,
        rows=size.number("height", 0, 0xFFFF) or 0,
        columns=size.number("width", 0, 0xFFFF) or 0,
    )


def _environment(process: Object) -> dict[str, str]:
    env: dict[str, str] = {}
    for index, entry in enumerate(process.texts("env")):
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise CallerError(
                f"{process.path}.env[{index}] is {entry[:64]!r}; it must be NAME=value"
            )
        env[name] = value
    return env


def _capability_sets(sets: Object) -> CapabilitySets:
    values = {
        name: capabilities.bits(sets.texts(name), f"{sets.path}.{name}")
        for name in CapabilitySets.fields
    }
    # capabilities(7): the ambient set lies within permitted and inheritable; what does not is
    # dropped with the same silence as runc's.
    values["ambient"] &= values["permitted"] & values["inheritable"]
    if values["effective"] & ~values["permitted"]:
        raise CallerError(f"{sets.path}.effective holds more than {sets.path}.permitted")
    return CapabilitySets(**values)


def _rlimit(row: Object) -> Rlimit:
    name = row.text("type")
    if name not in RLIMITS:
        raise CallerError(f"{row.path}.type is {name!r}; it must be one of {', '.join(RLIMITS)}")
    soft = row.number("soft", 0, _U64) or 0
    hard = row.number("hard", 0, _U64) or 0
    if soft > hard:
        raise CallerError(f"{row.path}: {name} has soft {soft} above hard {hard}")
    infinity = resource.RLIM_INFINITY
    largest = (1 << 63) - 1
    return Rlimit(
        name,
        RLIMITS[name],
        infinity if soft > largest else soft,
        infinity if hard > largest else hard,
    )
