"""Which kernel serves a language. Imports of what a kernel needs wait until one is made."""

from __future__ import annotations

from collections.abc import Mapping

from .kernel import Kernel
from .languages import BASH, JAVASCRIPT, PYTHON, TYPESCRIPT


def make_kernel(language: str, cwd: str, environment: Mapping[str, str]) -> Kernel:
    """A kernel that is not started yet; `environment` is its process's."""
    if language in (JAVASCRIPT, TYPESCRIPT):
        from .javascript_kernel.process import JavascriptKernel

        return JavascriptKernel(cwd=cwd, environment=environment, typescript=language == TYPESCRIPT)
    from .jupyter_kernel import JupyterKernel
    from .kernel_programs import BASH_PROGRAM, PYTHON_PROGRAM

    program = {PYTHON: PYTHON_PROGRAM, BASH: BASH_PROGRAM}[language]
    return JupyterKernel(program, cwd=cwd, environment=environment)
