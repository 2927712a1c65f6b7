"""containerd's command line for a shim: flags in any order, then the action.

Source: containerd runtime/v2/shim/util.go and pkg/shim/shim.go; Go's flag syntax (`-flag value`,
`-flag=value`, one or two dashes). The order changed between 1.6 and 2.3, so none is assumed.
"""

from __future__ import annotations

from vmcell_protos.errors import CallerError

_VALUES = {
    "namespace": "namespace",
    "id": "id",
    "address": "address",
    "publish-binary": "publish_binary",
    "bundle": "bundle",
    "socket": "socket",
    "debug-socket": "debug_socket",
}
_SWITCHES = {"debug": "debug", "v": "version", "version": "version", "info": "info"}
ACTIONS = ("start", "delete")


class Invocation:
    """What one run of the binary was asked to do. `action` is "" for `-info` and `-v`."""

    __slots__ = (
        "action",
        "address",
        "bundle",
        "debug",
        "debug_socket",
        "id",
        "info",
        "namespace",
        "publish_binary",
        "socket",
        "version",
    )

    def __init__(self) -> None:
        self.action = ""
        self.namespace = ""
        self.id = ""
        self.address = ""
        self.publish_binary = ""
        self.bundle = ""
        self.socket = ""
        self.debug_socket = ""
        self.debug = False
        self.version = False
        self.info = False


def parse_args(arguments: list[str]) -> Invocation:
    """The invocation described by argv without the program's name; raises CallerError."""
    invocation = Invocation()
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith("-") or word == "-":
            _take_action(invocation, word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name in _SWITCHES:
            setattr(invocation, _SWITCHES[name], not equals or value.lower() in ("true", "1", "t"))
        elif name in _VALUES:
            if not equals:
                if not queue:
                    raise CallerError(f"flag -{name} is the last word; give it a value")
                value = queue.pop(0)
            setattr(invocation, _VALUES[name], value)
        else:
            raise CallerError(f"flag {word!r} is not one a containerd shim has")
    return invocation


def _take_action(invocation: Invocation, word: str) -> None:
    if word not in ACTIONS:
        raise CallerError(f"action {word!r} is not one of {', '.join(ACTIONS)}")
    if invocation.action:
        raise CallerError(f"action {word!r} follows {invocation.action!r}; give one")
    invocation.action = word


def check_identity(invocation: Invocation) -> None:
    """`start` and `delete` need names that are also file names.

    Source of the form: containerd identifiers/validate.go. Raises CallerError.
    """
    for flag, value in (("namespace", invocation.namespace), ("id", invocation.id)):
        allowed = value.replace("-", "").replace("_", "").replace(".", "")
        good = allowed.isascii() and allowed.isalnum() and len(value) <= 76
        if not good or not (value[0].isalnum() and value[-1].isalnum()):
            raise CallerError(
                f"-{flag} {value!r} is no containerd identifier: letters, digits, '-', '_', '.', "
                "at most 76 characters, first and last a letter or digit"
            )
