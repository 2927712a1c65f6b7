"""vmcell's part of containerd's configuration, for 1.6, 1.7 and 2.x: text in, text out.

CRI (Kubernetes, crictl) finds a runtime by a table in containerd's config.toml; ctr and nerdctl
need none. The table's name depends on the version of the configuration; 2.x reads that of 1.x too.
Source: containerd docs/cri/config.md and releases.md.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

from vmcell_protos.errors import HostError
from vmcell_shim.annotations import POD_NAMES, PREFIX
from vmcell_shim.info import NAME

HANDLER = "vmcell"
RUNC, RUNC_TYPE = "runc", "io.containerd.runc.v2"
BEGIN, END = "# vmcell: begin", "# vmcell: end"
CRI_V2, CRI_V3 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"
# What a pod may say about its own VM. The other annotations under the prefix name things of the
# host (a TAP interface), so whoever may make pods must not set them.
POD_ANNOTATIONS = tuple(PREFIX + name for name in POD_NAMES)


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """What to append to the configuration of one generation of containerd.

    `since` is the oldest containerd it is for, `version` that of the configuration it belongs in;
    in those of `same_in`, which newer releases write, the tables have the same names.
    """

    file: str
    since: tuple[int, int]
    version: int
    plugin: str
    notes: tuple[str, ...]
    same_in: tuple[int, ...] = ()

    def table(self, runtime: str) -> str:
        return f'[plugins."{self.plugin}".containerd.runtimes.{runtime}]'

    @property
    def runc(self) -> str:
        """The default runtime, for a configuration that names no other."""
        return f'{self.table(RUNC)}\n  runtime_type = "{RUNC_TYPE}"\n'

    @property
    def text(self) -> str:
        release = "2.x" if self.since[0] == 2 else ".".join(map(str, self.since))
        versions = " or ".join(map(str, (self.version, *self.same_in)))
        rows = [
            f"# vmcell as a runtime of CRI, for containerd {release} with a configuration of",
            f"# `version = {versions}`. Append it to /etc/containerd/config.toml and restart",
            "# containerd; `vmcell setup --containerd` does the former and keeps a backup.",
            "# Where the file has no table of a runtime yet, take runc's in too: containerd",
            "# 1.x forgets its built-in one as soon as another is named.",
            *(f"# {line}" for line in self.runc.splitlines()),
            self.table(HANDLER),
            f'  runtime_type = "{NAME}"',
            "  # What a pod may say about its own VM; other annotations name things of the host.",
            f"  pod_annotations = [{', '.join(map(repr_toml, POD_ANNOTATIONS))}]",
            "  # A privileged container has all of its guest, and no device of the host.",
            "  privileged_without_host_devices = true",
            *(f"  # {note}" for note in self.notes),
        ]
        return "\n".join(rows) + "\n"


SNIPPETS = (
    Snippet(
        file="containerd-1.6.toml",
        since=(1, 6),
        version=2,
        plugin=CRI_V2,
        notes=("All runtimes share one snapshotter here; overlayfs is fine.",),
    ),
    Snippet(
        file="containerd-1.7.toml",
        since=(1, 7),
        version=2,
        plugin=CRI_V2,
        notes=(
            'snapshotter = "blockfile"  # one of its own; without it the default of all runtimes',
        ),
    ),
    Snippet(
        file="containerd-2.toml",
        since=(2, 0),
        version=3,
        plugin=CRI_V3,
        same_in=(4,),
        notes=(
            'snapshotter = "erofs"  # one of its own; without it the default of all runtimes.',
            "  From 2.2 on that one's layers reach the guest as they are. Images are pulled for",
            "  it where the table `runtime_platforms.vmcell` of the images' plugin names it too.",
        ),
    ),
)


def repr_toml(text: str) -> str:
    """A basic string of TOML, for text without quotes and backslashes."""
    return f'"{text}"'


def parse_version(output: str) -> tuple[int, int] | None:
    """Major and minor from `containerd --version`; None for anything else."""
    words = output.split()
    parts = words[2].lstrip("v").replace("~", ".").split(".") if len(words) > 2 else []
    if len(parts) < 2 or not all(part.isascii() and part.isdigit() for part in parts[:2]):
        return None
    return int(parts[0]), int(parts[1])


def fitting_snippet(containerd: tuple[int, int], config: str | None) -> Snippet:
    """The snippet for that containerd with that configuration (None: it has no file yet).

    Raises HostError for a containerd that is too old, and for a configuration that is not TOML or
    of a version that takes no snippet.
    """
    fitting = [row for row in SNIPPETS if row.since <= containerd]
    if not fitting:
        raise HostError(
            f"containerd {containerd[0]}.{containerd[1]} is too old; install 1.6 or later"
        )
    if config is None:
        return fitting[-1]
    version = _parse(config).get("version", 1)
    rows = [row for row in fitting if version in (row.version, *row.same_in)]
    if not rows:
        raise HostError(
            f"containerd's configuration has version {version!r}; write it anew with"
            " `containerd config migrate`, or add `version = 2` where it names no plugin"
        )
    return rows[-1]


def runtimes_of(config: str) -> dict[str, object]:
    """The tables of runtimes that a configuration names, in either form, by handler.

    Raises HostError when it is not TOML.
    """
    found: dict[str, object] = {}
    for plugin in (CRI_V2, CRI_V3):
        table = _parse(config).get("plugins", {})
        for name in (plugin, "containerd", "runtimes"):
            table = table.get(name, {}) if isinstance(table, dict) else {}
        found.update(table if isinstance(table, dict) else {})
    return found


def cri_is_disabled(config: str) -> bool:
    """As Docker's packages ship it; then no pod runs, with whatever runtime."""
    disabled = _parse(config).get("disabled_plugins", [])
    names = disabled if isinstance(disabled, list) else []
    return any(name in names for name in ("cri", CRI_V2, CRI_V3))


def merged(config: str | None, snippet: Snippet) -> str:
    """The configuration with the snippet at its end, between marks, in place of an older one.

    Raises HostError when the result would not be what it should: the runtime stands there without
    our marks, or in a form that takes no further table.
    """
    before = f"version = {snippet.version}\n" if config is None else without_block(config)
    present = runtimes_of(before)
    if HANDLER in present:
        raise HostError(
            f"the configuration has a runtime {HANDLER!r} of its own making; "
            f"remove that table, or compare it with {snippet.file} by hand"
        )
    gap = "" if before.endswith("\n\n") else "\n" if before.endswith("\n") else "\n\n"
    runc = "" if present else snippet.runc
    after = f"{before}{gap}{BEGIN}\n{snippet.text}{runc}{END}\n"
    if HANDLER not in runtimes_of(after):
        raise HostError(f"the configuration takes no further table; merge {snippet.file} by hand")
    return after


def without_block(config: str) -> str:
    """The configuration without what `merged` added; HostError when only half of it is there."""
    lines = config.splitlines(keepends=True)
    begins = [number for number, line in enumerate(lines) if line.strip() == BEGIN]
    ends = [number for number, line in enumerate(lines) if line.strip() == END]
    if not begins and not ends:
        return config
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise HostError(
            f"the marks {BEGIN!r} and {END!r} do not enclose one block; remove it by hand"
        )
    before = lines[: begins[0]]
    # The empty line that was put before the block.
    if before and not before[-1].strip():
        before.pop()
    return "".join([*before, *lines[ends[0] + 1 :]])


def _parse(config: str) -> dict[str, object]:
    try:
        return tomllib.loads(config)
    except tomllib.TOMLDecodeError as error:
        raise HostError(f"containerd's configuration is not TOML: {error}") from error
