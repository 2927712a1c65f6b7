// Calls of the npm package `@e2b/code-interpreter`.

import { Sandbox } from "@e2b/code-interpreter";
import { NoSandbox, PATIENCE_MS, check, expect, method, runCalls } from "./report.mjs";

const TEMPLATE = process.env.VMCELL_MATRIX_INTERPRETER_TEMPLATE ?? "code-interpreter-v1";
const CHART = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()";

let made;
const box = () => {
  if (made === undefined) throw new NoSandbox();
  return made;
};
const code = (text, options = {}) => box().runCode(text, { timeoutMs: PATIENCE_MS, ...options });

await runCalls([
  [
    "Sandbox.create",
    async () => {
      const options = { timeoutMs: 1_800_000, requestTimeoutMs: PATIENCE_MS };
      made = await Sandbox.create(TEMPLATE, options);
    },
  ],
  [
    "run_code",
    async () => {
      expect((await code("x = 20\nx + 1")).text, "21");
      expect((await code("x")).text, "20");
    },
  ],
  ["run_code: stdout", async () => expect((await code("print('seen')")).logs.stdout, ["seen\n"])],
  ["run_code: error", async () => expect((await code("1 / 0")).error.name, "ZeroDivisionError")],
  [
    "run_code: envs",
    async () => {
      const done = await code("import os; os.environ['RUN']", { envs: { RUN: "once" } });
      expect(done.text, "once");
    },
  ],
  ["run_code: PNG", async () => check((await code(CHART)).results[0].png, "a PNG")],
  ["run_code: chart", async () => expect((await code(CHART)).results[0].chart.type, "line")],
  [
    "run_code: JavaScript",
    async () => expect((await code("1 + 1", { language: "js" })).text, "2"),
  ],
  [
    "run_code: bash",
    async () => {
      const done = await code("echo from bash", { language: "bash" });
      expect(done.logs.stdout, ["from bash\n"]);
    },
  ],
  [
    "code contexts",
    async () => {
      const context = await method(box(), "createCodeContext")({ cwd: "/tmp" });
      await code("y = 5", { context });
      expect((await code("y", { context })).text, "5");
    },
  ],
  [
    "code contexts: restart, list, remove",
    async () => {
      const context = await method(box(), "createCodeContext")();
      await method(box(), "restartCodeContext")(context);
      const ids = (await box().listCodeContexts()).map((found) => found.id);
      check(ids.includes(context.id), "the context in the list");
      await box().removeCodeContext(context);
    },
  ],
  [
    "commands.run",
    async () => {
      const done = await box().commands.run("echo hi", { timeoutMs: PATIENCE_MS });
      expect(done.stdout, "hi\n");
    },
  ],
  ["kill", () => box().kill()],
]);
