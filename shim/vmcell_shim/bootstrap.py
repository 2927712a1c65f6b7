"""The shim binary's main: one action, one answer on stdout, one sentence on stderr when it fails.

`start` and `delete` are asked of the node's zygote first; without one, or with any doubt about it,
they are done here. `zygote` makes this process the zygote. No import beyond what is built in
until it is known that the zygote does not do it.
"""

import posix

from vmcell_shim.zygote_stub import ask_zygote, read_stdin


def main(argv: list[str]) -> int:
    """Runs `argv` (with the program's name); returns the exit status."""
    if argv[1:2] == ["zygote"]:
        from vmcell_shim.zygote import main as be_zygote

        return be_zygote(argv)
    action = argv[-1] if len(argv) > 1 else ""  # containerd puts it last
    stdin = read_stdin() if action == "start" else b""
    answer = ask_zygote(argv, stdin) if action in ("start", "delete") else None
    if answer is None:
        return _act_directly(argv, stdin)
    _report(answer.output, answer.errors)
    # Nothing is left to do, and the interpreter's own end would take a millisecond.
    posix._exit(answer.number)


def _act_directly(argv: list[str], stdin: bytes) -> int:
    from vmcell_shim.actions import perform

    outcome = perform(argv, stdin)
    if outcome.serve is not None and posix.fork() == 0:
        outcome.serve()
        return 0
    _report(outcome.output, outcome.errors)
    return outcome.status


def _report(output: bytes, errors: bytes) -> None:
    for fd, data in ((2, errors), (1, output)):
        while data:
            data = data[posix.write(fd, data) :]
