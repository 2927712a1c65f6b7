"""`python -m …launch python|bash -f FILE`: a kernel that loses nothing of what it publishes.

ZeroMQ drops what a subscriber has not taken when a thousand messages wait for it; a loop that
displays is quicker than any reader. Source: zmq_setsockopt(3), ZMQ_SNDHWM.
"""

from __future__ import annotations

import sys
from typing import Any

import zmq
from ipykernel.kernelapp import IPKernelApp


class WholeKernelApp(IPKernelApp):
    """ipykernel's application, its publishing socket without a bound."""

    def init_iopub(self, context: Any) -> None:
        """Makes the socket; the option is for those that come after it."""
        context.setsockopt(zmq.SNDHWM, 0)
        super().init_iopub(context)


def main() -> None:
    """Runs the kernel that the first argument names until it is told to end."""
    language = sys.argv.pop(1)
    options = {}
    if language == "bash":
        from bash_kernel.kernel import BashKernel

        options["kernel_class"] = BashKernel
    WholeKernelApp.launch_instance(**options)


if __name__ == "__main__":
    main()
