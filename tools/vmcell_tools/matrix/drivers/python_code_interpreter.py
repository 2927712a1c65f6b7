"""Calls of the PyPI package `e2b-code-interpreter`, from 1.0 to the newest."""

from __future__ import annotations

import os

from e2b_code_interpreter import Sandbox
from report import PATIENCE_S, OneSandbox, attribute, expect, run_calls

TEMPLATE = os.environ.get("VMCELL_MATRIX_INTERPRETER_TEMPLATE", "code-interpreter-v1")
CHART = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 3])
plt.show()
"""


class Calls(OneSandbox):
    """The calls, on one sandbox of the interpreter's template."""

    def _code(self, code, **options):
        return self.sandbox.run_code(code, timeout=PATIENCE_S, **options)

    def create(self):
        make = getattr(Sandbox, "create", None) or Sandbox
        self._made = make(TEMPLATE, timeout=1800, request_timeout=PATIENCE_S)

    def run_code(self):
        expect(self._code("x = 20\nx + 1").text, "21")
        expect(self._code("x").text, "20")

    def stdout(self):
        expect(self._code("print('seen')").logs.stdout, ["seen\n"])

    def error(self):
        expect(self._code("1 / 0").error.name, "ZeroDivisionError")

    def envs(self):
        done = self._code("import os; os.environ['RUN']", envs={"RUN": "once"})
        expect(done.text, "once")

    def png(self):
        assert self._code(CHART).results[0].png

    def chart(self):
        expect(str(self._code(CHART).results[0].chart.type.value), "line")

    def javascript(self):
        expect(self._code("1 + 1", language="js").text, "2")

    def bash(self):
        expect(self._code("echo from bash", language="bash").logs.stdout, ["from bash\n"])

    def context(self):
        context = attribute(self.sandbox, "create_code_context")(cwd="/tmp")
        self._code("y = 5", context=context)
        expect(self._code("y", context=context).text, "5")

    def context_admin(self):
        context = attribute(self.sandbox, "create_code_context")()
        attribute(self.sandbox, "restart_code_context")(context)
        listed = [found.id for found in self.sandbox.list_code_contexts()]
        assert context.id in listed, listed
        self.sandbox.remove_code_context(context)

    def command(self):
        expect(self.sandbox.commands.run("echo hi", timeout=PATIENCE_S).stdout, "hi\n")

    def kill(self):
        # e2b 1.x says nothing, whatever its hints promise
        expect(self.sandbox.kill() in (True, None), True)


def main():
    c = Calls()
    run_calls(
        [
            ("Sandbox.create", c.create),
            ("run_code", c.run_code),
            ("run_code: stdout", c.stdout),
            ("run_code: error", c.error),
            ("run_code: envs", c.envs),
            ("run_code: PNG", c.png),
            ("run_code: chart", c.chart),
            ("run_code: JavaScript", c.javascript),
            ("run_code: bash", c.bash),
            ("code contexts", c.context),
            ("code contexts: restart, list, remove", c.context_admin),
            ("commands.run", c.command),
            ("kill", c.kill),
        ]
    )


if __name__ == "__main__":
    main()
