// Calls of the npm package `e2b`, from 1.0 to the newest, against a running service.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import * as e2b from "e2b";
import { Absent, NoSandbox, PATIENCE_MS, check, expect, method, runCalls, waitFor } from "./report.mjs";

const TEMPLATE = process.env.VMCELL_MATRIX_TEMPLATE ?? "base";
const OPTIONS = { timeoutMs: 1_800_000, requestTimeoutMs: PATIENCE_MS };
const { Sandbox } = e2b;

let made;
const box = () => {
  if (made === undefined) throw new NoSandbox();
  return made;
};
const create = (options = {}, template = TEMPLATE) =>
  Sandbox.create(template, { ...OPTIONS, ...options });
// A version that does not know an option drops it without a word.
const source = readFileSync(createRequire(import.meta.url).resolve("e2b"), "utf8");
const needOption = (name) => {
  if (!source.includes(name)) throw new Absent(name);
};
const throwaway = async (options) => {
  Object.keys(options).forEach(needOption);
  await (await create(options)).kill();
};
const run = (command, options = {}) =>
  box().commands.run(command, { timeoutMs: PATIENCE_MS, ...options });
const plainId = (id) => id.split("-")[0];
const listed = async (query) => {
  const found = await Sandbox.list(query ? { query } : undefined);
  return Array.isArray(found) ? found : await found.nextItems();
};

async function failure(action) {
  try {
    await action();
  } catch (error) {
    return error;
  }
  throw new Error("it did not fail");
}

async function ptyCall() {
  let seen = "";
  const handle = await method(box().pty, "create")({
    cols: 70,
    rows: 20,
    timeoutMs: PATIENCE_MS,
    onData: (data) => {
      seen += new TextDecoder().decode(data);
    },
  });
  await box().pty.resize(handle.pid, { cols: 111, rows: 33 });
  await box().pty.sendInput(handle.pid, new TextEncoder().encode("stty size; exit\n"));
  await handle.wait();
  check(seen.includes("33 111"), `the new size in ${seen}`);
}

async function watch(options = {}) {
  await box().files.makeDir("watched/deep");
  const events = [];
  const handle = await method(box().files, "watchDir")("watched", (event) => events.push(event), {
    timeoutMs: PATIENCE_MS,
    ...options,
  });
  await box().files.write(options.recursive ? "watched/deep/x" : "watched/x", "y");
  const name = options.recursive ? "deep/x" : "x";
  await waitFor(() => events.some((event) => event.name === name), `an event of ${name}`);
  await handle.stop();
  return events;
}

async function withSandbox(action, options = {}, template = TEMPLATE) {
  const sandbox = await create(options, template);
  try {
    await action(sandbox);
  } finally {
    await sandbox.kill();
  }
}

const PATIENT = { requestTimeoutMs: PATIENCE_MS };
const pauseAndConnect = () =>
  withSandbox(async (sandbox) => {
    const pause = sandbox.pause ?? sandbox.betaPause;
    if (pause === undefined) throw new Absent("pause");
    const process = await sandbox.commands.run("sleep 3600", { background: true, timeoutMs: 0 });
    await sandbox.files.write("kept", "x");
    await pause.call(sandbox, PATIENT);
    const again = await Sandbox.connect(sandbox.sandboxId, OPTIONS);
    expect(await again.files.read("kept"), "x");
    const pids = (await again.commands.list()).map((row) => row.pid);
    check(pids.includes(process.pid), "the process");
  });

async function pauseFilesAlone() {
  needOption("keepMemory");
  await withSandbox((sandbox) => sandbox.pause({ keepMemory: false, ...PATIENT }));
}

async function letItPause(sandbox) {
  await sandbox.setTimeout(1000);
  await waitFor(async () => (await sandbox.getInfo()).state === "paused", "its pause");
}

async function autoPause() {
  needOption("lifecycle");
  const again = async (sandbox) => {
    await letItPause(sandbox);
    const woken = await Sandbox.connect(sandbox.sandboxId, OPTIONS);
    expect((await woken.commands.run("echo back", { timeoutMs: PATIENCE_MS })).stdout, "back\n");
  };
  await withSandbox(again, { lifecycle: { onTimeout: "pause" } });
}

async function autoResume() {
  needOption("lifecycle");
  const woken = async (sandbox) => {
    await letItPause(sandbox);
    const { stdout } = await sandbox.commands.run("echo woken", { timeoutMs: PATIENCE_MS });
    expect(stdout, "woken\n");
  };
  await withSandbox(woken, { lifecycle: { onTimeout: "pause", autoResume: true } });
}

async function snapshots() {
  const make = method(box(), "createSnapshot");
  await box().files.write("saved", "x");
  const { snapshotId } = await make(PATIENT);
  try {
    const saved = async (sandbox) => expect(await sandbox.files.read("saved"), "x");
    await withSandbox(saved, {}, snapshotId);
  } finally {
    await Sandbox.deleteSnapshot(snapshotId);
  }
}

async function forks() {
  const fork = method(box(), "fork");
  await box().files.write("forked", "x");
  const [copy] = await fork(PATIENT);
  if (copy instanceof Error) throw copy;
  try {
    expect(await copy.files.read("forked"), "x");
  } finally {
    await copy.kill();
  }
}

async function secrets() {
  if (e2b.Secret === undefined) throw new Absent("Secret");
  await e2b.Secret.create("matrix", "value");
}

const sandboxCalls = [
  [
    "Sandbox.create",
    async () => {
      made = await create({ metadata: { matrix: "a b&c" }, envs: { COLOUR: "red" } });
    },
  ],
  [
    "Sandbox.list",
    async () => {
      const ids = (await listed()).map((item) => plainId(item.sandboxId));
      check(ids.includes(plainId(box().sandboxId)), "the sandbox in the list");
    },
  ],
  [
    "Sandbox.list by metadata",
    async () => {
      const found = await listed({ metadata: { matrix: "a b&c" } });
      expect(found.map((item) => plainId(item.sandboxId)), [plainId(box().sandboxId)]);
    },
  ],
  [
    "get_info",
    async () => {
      const info = await method(box(), "getInfo")();
      expect(info.metadata, { matrix: "a b&c" });
    },
  ],
  [
    "Sandbox.connect",
    async () => {
      const again = await Sandbox.connect(box().sandboxId);
      const done = await again.commands.run("echo again", { timeoutMs: PATIENCE_MS });
      expect(done.stdout, "again\n");
    },
  ],
  ["set_timeout", () => box().setTimeout(1_860_000)],
  ["is_running", async () => expect(await box().isRunning(), true)],
  [
    "get_metrics",
    async () => {
      const get = method(box(), "getMetrics");
      const found = await waitFor(async () => {
        const metrics = await get();
        return metrics.length > 0 && metrics;
      }, "metrics of the sandbox");
      check(found[0].cpuCount >= 1, "a processor");
    },
  ],
];

const commandCalls = [
  ["commands.run", async () => expect((await run("echo out; echo err >&2")).stdout, "out\n")],
  [
    "commands.run: exit code",
    async () => {
      const error = await failure(() => run("echo oops >&2; exit 9"));
      expect([error.exitCode, error.stderr], [9, "oops\n"]);
    },
  ],
  [
    "commands.run: user, envs, cwd",
    async () => {
      const options = { envs: { A: "b" }, user: "root", cwd: "/tmp" };
      expect((await run("echo $COLOUR $A $(id -un) $PWD", options)).stdout, "red b root /tmp\n");
    },
  ],
  [
    "commands.run: callbacks",
    async () => {
      let seen = "";
      await run("echo one; echo two", { onStdout: (text) => void (seen += text) });
      expect(seen, "one\ntwo\n");
    },
  ],
  [
    "commands.run: timeout",
    async () => {
      const error = await failure(() => run("sleep 120", { timeoutMs: 2000 }));
      expect(error.constructor.name, "TimeoutError");
    },
  ],
  [
    "commands.run: background, list",
    async () => {
      const handle = await run("sleep 1; echo late", { background: true });
      const pids = (await box().commands.list()).map((process) => process.pid);
      check(pids.includes(handle.pid), "the command in the list");
      expect((await handle.wait()).stdout, "late\n");
    },
  ],
  [
    "commands.kill",
    async () => {
      const handle = await run("sleep 300", { background: true });
      expect(await box().commands.kill(handle.pid), true);
      expect(await box().commands.kill(4_000_000), false);
      await handle.wait().catch(() => undefined);
    },
  ],
  [
    "commands.connect",
    async () => {
      const handle = await run("sleep 3; echo reached", { background: true });
      await handle.disconnect();
      const again = await box().commands.connect(handle.pid, { timeoutMs: PATIENCE_MS });
      expect((await again.wait()).stdout, "reached\n");
    },
  ],
  [
    "commands.send_stdin",
    async () => {
      const handle = await run("head -n 1", { background: true, stdin: true });
      await box().commands.sendStdin(handle.pid, "typed\n");
      expect((await handle.wait()).stdout, "typed\n");
    },
  ],
  [
    "commands.close_stdin",
    async () => {
      const close = method(box().commands, "closeStdin");
      const handle = await run("cat", { background: true, stdin: true });
      await box().commands.sendStdin(handle.pid, "all");
      await close(handle.pid);
      expect((await handle.wait()).stdout, "all");
    },
  ],
  ["pty: create, resize, input", ptyCall],
];

const fileCalls = [
  [
    "files.write, read",
    async () => {
      await box().files.write("notes/a.txt", "héllo");
      expect(await box().files.read("/home/user/notes/a.txt"), "héllo");
    },
  ],
  [
    "files.read: bytes, stream",
    async () => {
      const content = new Uint8Array(1 << 20).map((_, n) => n % 256);
      await box().files.write("blob", content.buffer);
      const back = await box().files.read("blob", { format: "bytes" });
      check(Buffer.compare(Buffer.from(back), Buffer.from(content)) === 0, "equal bytes");
      let length = 0;
      for await (const piece of await box().files.read("blob", { format: "stream" })) {
        length += piece.length;
      }
      expect(length, content.length);
    },
  ],
  [
    "files.write: several",
    async () => {
      const pairs = [0, 1, 2].map((n) => ({ path: `many/${n}`, data: String(n) }));
      await (box().files.writeFiles ?? box().files.write).call(box().files, pairs);
      expect(await box().files.read("many/2"), "2");
    },
  ],
  [
    "files.list",
    async () => {
      await box().files.makeDir("tree/below");
      await box().files.write("tree/leaf", "x");
      const names = (await box().files.list("tree")).map((entry) => entry.name);
      expect(names.sort(), ["below", "leaf"]);
    },
  ],
  [
    "files.exists",
    async () => {
      expect(await box().files.exists("tree/leaf"), true);
      expect(await box().files.exists("tree/none"), false);
    },
  ],
  [
    "files.get_info",
    async () => {
      const info = await method(box().files, "getInfo")("tree/leaf");
      expect([info.size, info.owner, info.permissions], [1, "user", "-rw-r--r--"]);
    },
  ],
  [
    "files.make_dir",
    async () => {
      expect(await box().files.makeDir("fresh/dir"), true);
      expect(await box().files.makeDir("fresh/dir"), false);
    },
  ],
  [
    "files.rename",
    async () => {
      await box().files.write("old-name", "x");
      expect((await box().files.rename("old-name", "moved/new-name")).name, "new-name");
    },
  ],
  [
    "files.remove",
    async () => {
      await box().files.remove("moved");
      expect(await box().files.exists("moved"), false);
    },
  ],
  [
    "files: missing",
    async () => {
      const error = await failure(() => box().files.read("no-such-file"));
      check(error instanceof e2b.NotFoundError, `NotFoundError, not ${error}`);
    },
  ],
  ["files.watch_dir", () => watch()],
  ["files.watch_dir: recursive", () => watch({ recursive: true })],
  [
    "files.watch_dir: entries",
    async () => {
      needOption("includeEntry");
      const events = await watch({ includeEntry: true });
      check(events.some((event) => event.entry !== undefined), "an entry");
    },
  ],
  [
    "files.write: metadata",
    async () => {
      needOption("X-Metadata-");
      await box().files.write("labelled", "x", { metadata: { kind: "note" } });
      const info = await method(box().files, "getInfo")("labelled");
      expect(info.metadata, { kind: "note" });
    },
  ],
  [
    "download_url, signed",
    async () => {
      const url = await box().downloadUrl("notes/a.txt", { user: "user" });
      const answer = await fetch(url);
      expect([answer.status, await answer.text()], [200, "héllo"]);
    },
  ],
];

const otherCalls = [
  ["allow_internet_access=False", () => throwaway({ allowInternetAccess: false })],
  ["network rules", () => throwaway({ network: { denyOut: ["0.0.0.0/0"] } })],
  [
    "network rules: domain names",
    () => throwaway({ network: { denyOut: ["0.0.0.0/0"], allowOut: ["example.com"] } }),
  ],
  ["update_network", () => method(box(), "updateNetwork")({ denyOut: ["10.0.0.0/8"] })],
  ["pause, connect", pauseAndConnect],
  ["pause: files alone", pauseFilesAlone],
  ["lifecycle: auto-pause", autoPause],
  ["lifecycle: auto-resume", autoResume],
  ["snapshots", snapshots],
  ["fork", forks],
  [
    "volumes",
    async () => {
      if (e2b.Volume === undefined) throw new Absent("Volume");
      await e2b.Volume.create(`matrix-${Date.now()}`);
    },
  ],
  [
    "Template.exists",
    async () => {
      if (e2b.Template === undefined) throw new Absent("Template");
      const ask = e2b.Template.exists ?? e2b.Template.aliasExists;
      if (ask === undefined) throw new Absent("Template.exists");
      expect(await ask.call(e2b.Template, "surely-no-such-template"), false);
    },
  ],
  ["secrets", secrets],
  ["mcp", () => throwaway({ mcp: { everything: {} } })],
  // 1.x says nothing.
  ["kill", async () => expect((await box().kill()) ?? true, true)],
  ["kill again", async () => expect((await box().kill()) ?? false, false)],
  [
    "commands.run after kill",
    async () => {
      const error = await failure(() => run("true"));
      const name = error.constructor.name;
      check(/^(Timeout|Sandbox|SandboxNotRunning|.*NotFound)Error$/.test(name), `not ${error}`);
    },
  ],
];

await runCalls([...sandboxCalls, ...commandCalls, ...fileCalls, ...otherCalls]);
