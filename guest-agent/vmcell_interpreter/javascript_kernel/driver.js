// Runs in Node, beside the code it serves: takes one request at a time and says what comes of it.
//
// argv: descriptors of requests (read), messages (write) and stops (read), each a JSON object a
// line. V8's own REPL mode evaluates: top-level await, and let and const that may be declared again.
// Source: Chrome DevTools Protocol, Runtime.evaluate.
'use strict';

const fs = require('node:fs');
const inspector = require('node:inspector');
const net = require('node:net');
const path = require('node:path');
const util = require('node:util');
const { createRequire } = require('node:module');
const { StringDecoder } = require('node:string_decoder');
const { pathToFileURL } = require('node:url');
const { Worker } = require('node:worker_threads');
const { prepared } = require('./source.js');

const [requestsFd, messagesFd, stopsFd] = process.argv.slice(2, 5).map(Number);
const here = path.join(process.cwd(), 'code.js');
const DISPLAY = Symbol.for('Jupyter.display');
// One word that the worker reads: whether code runs that a stop may end.
const running = new Int32Array(new SharedArrayBuffer(4));
let executionCount = 0;
let current = null;

function send(message) {
  let rest = Buffer.from(JSON.stringify(message) + '\n');
  while (rest.length) {
    try {
      rest = rest.subarray(fs.writeSync(messagesFd, rest));
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
    }
  }
}

// What code prints goes the same way as results, so that the order is kept.
for (const name of ['stdout', 'stderr']) {
  const decoder = new StringDecoder('utf8');
  process[name].write = (chunk, encoding, callback) => {
    const text = typeof chunk === 'string' ? chunk : decoder.write(Buffer.from(chunk));
    if (text) send({ type: name, text });
    const done = typeof encoding === 'function' ? encoding : callback;
    if (done) process.nextTick(done);
    return true;
  };
}

function asJson(value) {
  if (value === null || typeof value !== 'object') return undefined;
  const plain = Array.isArray(value) || [Object.prototype, null].includes(Object.getPrototypeOf(value));
  try {
    return plain ? JSON.parse(JSON.stringify(value)) : undefined;
  } catch {
    return undefined;
  }
}

function bundleOf(value) {
  if (value !== null && typeof value === 'object' && typeof value[DISPLAY] === 'function') {
    return JSON.parse(JSON.stringify(value[DISPLAY]()));
  }
  const bundle = { 'text/plain': util.inspect(value) };
  const json = asJson(value);
  if (json !== undefined) bundle['application/json'] = json;
  return bundle;
}

// The stack down to where our own part of it begins.
function stackOf(error) {
  const rows = String(error.stack).split('\n');
  const ours = rows.findIndex((row) => row.includes('node:inspector') || row.includes(__dirname));
  return rows.slice(0, ours < 0 ? undefined : ours).join('\n');
}

function sendError(error) {
  if (error instanceof Error) {
    send({ type: 'error', name: error.name, value: error.message, traceback: stackOf(error) });
  } else {
    send({ type: 'error', name: 'Error', value: util.inspect(error), traceback: '' });
  }
}

function end(request) {
  if (current !== request) return;
  current = null;
  for (const [name, value] of Object.entries(request.before)) {
    if (value === null) delete process.env[name];
    else process.env[name] = value;
  }
  send({ type: 'end', id: request.id });
}

const session = new inspector.Session();
session.connect();

function post(method, parameters) {
  return new Promise((resolve, reject) => {
    Atomics.store(running, 0, 1);
    session.post(method, parameters, (error, answer) => (error ? reject(error) : resolve(answer)));
    Atomics.store(running, 0, 0);
  });
}

// The values of remote objects are handed to us by a call in the debugger's own terms.
let delivered;
Object.defineProperty(globalThis, Symbol.for('vmcell.deliver'), {
  value: (value) => { delivered = value; },
});
let deliverId;

async function local(remote) {
  if (!('objectId' in remote)) {
    return 'unserializableValue' in remote ? (0, eval)(remote.unserializableValue) : remote.value;
  }
  await post('Runtime.callFunctionOn', {
    objectId: deliverId,
    functionDeclaration: 'function (value) { this(value); }',
    arguments: [{ objectId: remote.objectId }],
  });
  const value = delivered;
  delivered = undefined;
  await post('Runtime.releaseObject', { objectId: remote.objectId });
  return value;
}

async function evaluated(code) {
  let answer = await post('Runtime.evaluate', { expression: code, replMode: true });
  if (answer.result.subtype === 'promise' && !answer.exceptionDetails) {
    answer = await post('Runtime.awaitPromise', { promiseObjectId: answer.result.objectId });
  }
  return answer;
}

async function run(request) {
  current = request;
  request.before = {};
  for (const [name, value] of Object.entries(request.environment)) {
    request.before[name] = process.env[name] ?? null;
    process.env[name] = value;
  }
  executionCount += 1;
  send({ type: 'count', count: executionCount });
  try {
    const answer = await evaluated(prepared(request.code, request.typescript));
    if (current !== request) return;
    if (answer.exceptionDetails) {
      const { exception, text } = answer.exceptionDetails;
      sendError(exception ? await local(exception) : new Error(text));
    } else if (answer.result.type !== 'undefined') {
      send({ type: 'result', bundle: bundleOf(await local(answer.result)), main: true });
    }
  } catch (error) {
    if (current !== request) return;
    if (/terminated/.test(error.message ?? '')) sendInterrupted();
    else sendError(error);
  }
  end(request);
}

function sendInterrupted() {
  send({ type: 'error', name: 'Interrupted', value: 'The run was interrupted', traceback: '' });
}

// A run that waits for something is ended here; one that is busy cannot hear this.
function interrupt(id) {
  if (current === null || current.id !== id) return;
  sendInterrupted();
  end(current);
}

function listen(fd, take) {
  const decoder = new StringDecoder('utf8');
  let text = '';
  const stream = new net.Socket({ fd, readable: true, writable: false });
  stream.on('data', (piece) => {
    text += decoder.write(piece);
    const rows = text.split('\n');
    text = rows.pop();
    rows.forEach((row) => take(JSON.parse(row)));
  });
  stream.on('close', () => process.exit(0));
  return stream;
}

// Node waits for debuggers before it exits, and says so.
process.on('exit', () => process.kill(process.pid, 'SIGKILL'));
process.on('uncaughtException', (error) => process.stderr.write(`Uncaught ${util.inspect(error)}\n`));
process.on('unhandledRejection', (error) => process.stderr.write(`Uncaught ${util.inspect(error)}\n`));

globalThis.require = createRequire(here);
globalThis[Symbol.for('vmcell.import')] = (name) => {
  if (name.startsWith('.') || name.startsWith('/')) {
    return import(pathToFileURL(path.resolve(process.cwd(), name)).href);
  }
  try {
    const found = globalThis.require.resolve(name);
    return import(path.isAbsolute(found) ? pathToFileURL(found).href : found);
  } catch {
    return import(name);
  }
};

const worker = new Worker(path.join(__dirname, 'stop.js'), { workerData: { stopsFd, running } });
worker.unref();
session.post(
  'Runtime.evaluate',
  { expression: "globalThis[Symbol.for('vmcell.deliver')]" },
  (error, answer) => {
    deliverId = answer.result.objectId;
    listen(requestsFd, (request) => {
      if (request.type === 'run') run(request);
      else if (request.type === 'interrupt') interrupt(request.id);
      else if (request.type === 'adopt') Object.assign(process.env, request.environment);
    });
    send({ type: 'ready' });
  },
);
