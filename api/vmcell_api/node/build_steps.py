"""The steps of a build, without I/O: what they mean, how they are named in the cache and the log.

Source: E2B's build start (`steps[] {type, args, filesHash, force}`): COPY [src, dest, user, mode],
RUN [command, user], ENV [name, value, ...], WORKDIR [path], USER [name]. Empty text means "not
given".
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import shlex
from dataclasses import dataclass

from vmcell_protos.errors import CallerError

MAX_STEPS = 200
MAX_ARGUMENT_CHARACTERS = 65536
FILES_HASH = re.compile(r"[0-9a-f]{64}")
BASE, FINALIZE = "base", "finalize"
# Changes when the same steps would give another image than before.
CACHE_RECIPE = "1"
# How many arguments each kind takes; None: any even number.
_COUNTS: dict[str, tuple[int, int] | None] = {
    "COPY": (2, 4),
    "RUN": (1, 2),
    "ENV": None,
    "WORKDIR": (1, 1),
    "USER": (1, 1),
}
_MODE = re.compile(r"0?[0-7]{3,4}")
# What a shell takes without quotes as an owner for chown.
_OWNER = re.compile(r"[A-Za-z0-9._-]+(:[A-Za-z0-9._-]*)?")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step as the client sent it, checked by `check_steps`."""

    type: str
    args: tuple[str, ...]
    files_hash: str = ""
    force: bool = False

    def argument(self, number: int) -> str:
        """The argument of that number, "" when it was not given."""
        return self.args[number] if number < len(self.args) else ""

    def words(self) -> str:
        """The step in a line of a log."""
        return " ".join((self.type, *filter(None, self.args)))


def check_steps(steps: list[Step]) -> None:
    """Raises CallerError for the first step that cannot be done, by its number from 1."""
    if len(steps) > MAX_STEPS:
        raise CallerError(f"the build has {len(steps)} steps; at most {MAX_STEPS}")
    for number, step in enumerate(steps, start=1):
        problem = _problem(step)
        if problem:
            raise CallerError(f"step {number} ({step.type[:20]!r}): {problem}")


def _problem(step: Step) -> str:
    if step.type not in _COUNTS:
        return f"this server has the steps {', '.join(_COUNTS)}"
    counts, given = _COUNTS[step.type], len(step.args)
    if any(len(arg) > MAX_ARGUMENT_CHARACTERS or "\0" in arg for arg in step.args):
        return f"an argument is longer than {MAX_ARGUMENT_CHARACTERS} characters or has a NUL"
    if counts is None:
        if not given or given % 2:
            return f"it has {given} arguments; give name and value for each variable"
        names = step.args[::2]
        wrong = [name for name in names if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
        return f"{wrong[0][:40]!r} is no name of a variable" if wrong else ""
    if not counts[0] <= given <= counts[1]:
        return f"it has {given} arguments; it takes {counts[0]} to {counts[1]}"
    if not step.args[0]:
        return "its first argument is empty"
    return _copy_problem(step) if step.type == "COPY" else ""


def _copy_problem(step: Step) -> str:
    source, user, mode = step.args[0], step.argument(2), step.argument(3)
    if not step.args[1]:
        return "it has no destination"
    if not FILES_HASH.fullmatch(step.files_hash):
        return "filesHash must be 64 hex digits in lower case"
    parts = posixpath.normpath(source).split("/")
    if source.startswith("/") or ".." in parts:
        return f"source {source[:80]!r} leads out of the uploaded files"
    if "**" in source or "\n" in source:
        return f"source {source[:80]!r} has '**', which this server does not expand; name folders"
    if user and not _OWNER.fullmatch(user):
        return f"{user[:40]!r} is no user, nor user:group"
    if mode and not _MODE.fullmatch(mode):
        return f"mode {mode[:20]!r} is not octal, like 0755"
    return ""


def first_key(team_id: str, manifest_digest: str) -> str:
    """The cache's key of the base: the image's manifest. Teams share nothing."""
    return _digest(CACHE_RECIPE, team_id, manifest_digest)


def next_key(key: str, step: Step) -> str:
    """The key of what is there after `step`, done on what has `key`."""
    return _digest(key, step.type, *step.args, step.files_hash)


def last_key(key: str, start_command: str, ready_command: str) -> str:
    """The key of the finished template."""
    return _digest(key, FINALIZE, start_command, ready_command)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def absolute(path: str, workdir: str) -> str:
    """`path` as seen from `workdir`, without dots; a slash at its end is kept."""
    joined = posixpath.normpath(posixpath.join("/", workdir, path))
    joined = "/" + joined.lstrip("/")
    return joined + "/" if path.endswith("/") and joined != "/" else joined


def value_script(value: str) -> str:
    """A shell script that prints `value` with its $NAME and ${NAME} put in.

    Quotes, backticks and $( are text: a value is data, not a program.
    """
    escaped = value.replace('"', '\\"').replace("`", "\\`").replace("$(", "\\$(")
    return f'printf %s "{escaped}"'


def make_user_script() -> str:
    """Gives an image the account that E2B's templates have, unless it is there.

    By sh alone, because images have useradd, adduser or neither.
    """
    return r"""set -e
if ! grep -q '^user:' /etc/passwd 2>/dev/null; then
  gid=$(sed -n 's/^user:[^:]*:\([0-9]*\):.*/\1/p' /etc/group 2>/dev/null || true)
  id=1000; taken=/etc/passwd; [ -n "$gid" ] || taken='/etc/passwd /etc/group'
  while grep -q "^[^:]*:[^:]*:$id:" $taken 2>/dev/null; do id=$((id + 1)); done
  shell=/bin/sh; [ -x /bin/bash ] && shell=/bin/bash
  grep -q '^root:' /etc/passwd 2>/dev/null || echo 'root:x:0:0:root:/root:/bin/sh' >> /etc/passwd
  grep -q '^root:' /etc/group 2>/dev/null || echo 'root:x:0:' >> /etc/group
  [ -n "$gid" ] || { gid=$id; echo "user:x:$gid:" >> /etc/group; }
  echo "user:x:$id:$gid:user:/home/user:$shell" >> /etc/passwd
fi
if [ ! -d /home/user ]; then
  mkdir -p /home/user
  chown user: /home/user 2>/dev/null || chown "$(id -u user):$(id -g user)" /home/user
fi
"""


def workdir_script(path: str, owner: str) -> str:
    """Makes the directory, owned by `owner` where it was not there."""
    place = shlex.quote(path)
    return (
        f"set -e\n[ -d {place} ] || {{ mkdir -p {place}; chown {shlex.quote(owner)}: {place}; }}\n"
    )


def copy_script(step: Step, *, folder: str, packed: bool, user: str, workdir: str) -> str:
    """Unpacks `folder`/files and puts what the step names to its destination, as root.

    A directory's content goes into the destination, as in a Dockerfile; a file takes the
    destination's place, or goes into it when that is a directory, ends with a slash, or several
    files are named. `folder` is removed by the caller.
    """
    source, destination = posixpath.normpath(step.args[0]), absolute(step.args[1], workdir)
    owner = step.argument(2) or user
    owner = owner if ":" in owner else f"{owner}:"
    pattern = _quoted_pattern(source)
    lines = [
        "set -e",
        f"cd {shlex.quote(folder)}",
        "mkdir x",
        f"tar -x{'z' if packed else ''}f files -C x",
        "cd x",
        f"chown -hR {shlex.quote(owner)} .",
        *_mode_lines(step.argument(3)),
        f"dest={shlex.quote(destination)}",
        f"set -- {pattern}",
        f'[ -e "$1" ] || [ -L "$1" ] || {{ echo {shlex.quote(source)}: not in the upload >&2; '
        "exit 1; }",
        "many=$#",
        'for one in "$@"; do',
        '  if [ -d "$one" ] && [ ! -L "$one" ]; then',
        '    mkdir -p "$dest"; cp -a "$one/." "$dest/"',
        '  elif [ "$many" -gt 1 ] || [ -d "$dest" ] || [ "${dest%/}" != "$dest" ]; then',
        '    mkdir -p "$dest"; cp -a "$one" "$dest/"',
        "  else",
        '    mkdir -p "$(dirname "$dest")"; cp -a "$one" "$dest"',
        "  fi",
        "done",
    ]
    return "\n".join(lines) + "\n"


def _mode_lines(mode: str) -> list[str]:
    """Files get the mode as it is; directories may be searched by whoever may read them."""
    if not mode:
        return []
    bits = int(mode, 8)
    search = bits | (bits & 0o444) >> 2
    return [
        f"find . -type f -exec chmod {bits:04o} {{}} +",
        f"find . -mindepth 1 -type d -exec chmod {search:04o} {{}} +",
    ]


def _quoted_pattern(source: str) -> str:
    """`source` for the shell with *, ? and [...] alive and all else quoted; never an option."""
    quoted = re.sub(r"[^*?\[\]]+", lambda match: shlex.quote(match.group()), source)
    return quoted if source == "." else f"./{quoted}"
