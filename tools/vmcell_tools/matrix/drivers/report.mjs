// What a JavaScript driver prints: one JSON line per call, as report.py does for Python.

const REFUSALS =
  /does not have|not supported|unsupported|no route|not allowed on|unimplemented|does not exist: image|template '[^']*' (does not exist|was not found)/i;
const DETAIL_CHARACTERS = 300;

// An emulated CPU takes twenty times as long as a real one.
export const PATIENCE_MS = 1000 * Number(process.env.VMCELL_MATRIX_PATIENCE_S ?? "60");

export class Absent extends Error {}

/** There is no sandbox to call: it has the outcome of the call that should have made one. */
export class NoSandbox extends Error {}

/** `thing[name]` bound to `thing`; Absent when this version of the client has none. */
export function method(thing, name) {
  if (thing === undefined || typeof thing[name] !== "function") throw new Absent(name);
  return thing[name].bind(thing);
}

/** An error that shows both, unless they are equal as JSON. */
export function expect(found, wanted) {
  const [left, right] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (left !== right) throw new Error(`got ${left}, not ${right}`);
}

export function check(truth, what) {
  if (!truth) throw new Error(`expected ${what}`);
}

/** The first true value of `condition()`, which is asked every tenth of a second. */
export async function waitFor(condition, what) {
  const until = Date.now() + PATIENCE_MS;
  while (Date.now() < until) {
    const value = await condition();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`waited ${PATIENCE_MS} ms for ${what}`);
}

function say(call, outcome, detail, ms) {
  const line = { call, outcome, detail: detail.slice(0, DETAIL_CHARACTERS), ms };
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

/** Make each of the [name, function] calls, whatever became of those before it. */
export async function runCalls(calls) {
  let first;
  for (const [name, call] of calls) {
    const began = Date.now();
    try {
      await call();
      say(name, "ok", "", Date.now() - began);
    } catch (error) {
      let text = `${error?.constructor?.name ?? "Error"}: ${error?.message ?? error}`;
      let outcome = error instanceof Absent ? "absent" : REFUSALS.test(text) ? "refused" : "failed";
      if (error instanceof NoSandbox) [outcome, text] = [first, "there is no sandbox to call"];
      first ??= outcome;
      say(name, outcome, text, Date.now() - began);
    }
  }
  // Clients keep connections, and with them the process, alive.
  process.exit(0);
}
