"""The kernels that speak Jupyter's protocol: their commands, and how variables are set in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from . import shell_words
from .jupyter_kernel import KernelProgram

_VARIABLES = '__import__("vmcell_interpreter.python_kernel.variables", fromlist=["enter"])'


def _python(verb: str) -> Callable[[Mapping[str, str]], str]:
    return lambda environment: f"{_VARIABLES}.{verb}({dict(environment)!r})"


def _command(language: str, *options: str) -> tuple[str, ...]:
    """-P: a file of the user's may be called like a module."""
    launch = ("-P", "-m", "vmcell_interpreter.python_kernel.launch", language)
    return (sys.executable, *launch, "-f", "{connection_file}", *options)


PYTHON_PROGRAM = KernelProgram(
    argv=_command(
        "python",
        "--InteractiveShellApp.extensions=vmcell_interpreter.python_kernel.extension",
        "--HistoryManager.hist_file=:memory:",
    ),
    language="python",
    adopt=_python("adopt"),
    enter=_python("enter"),
    leave=lambda environment: f"{_VARIABLES}.leave()",
)
BASH_PROGRAM = KernelProgram(
    argv=_command("bash"),
    language="bash",
    adopt=shell_words.adopt,
    enter=shell_words.enter,
    leave=shell_words.leave,
    # the kernel reads a terminal, and line ends of two bytes come apart on the way
    prepare="stty -onlcr",
)
