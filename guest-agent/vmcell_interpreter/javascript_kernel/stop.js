// A thread that ends code which never comes back, at the word of the server.
'use strict';

const inspector = require('node:inspector');
const net = require('node:net');
const { workerData } = require('node:worker_threads');

const session = new inspector.Session();
session.connectToMainThread();

const stream = new net.Socket({ fd: workerData.stopsFd, readable: true, writable: false });
// A stop while nothing runs would end whatever runs next, the driver itself perhaps.
stream.on('data', () => {
  if (Atomics.load(workerData.running, 0)) session.post('Runtime.terminateExecution');
});
// The server is gone: a busy main thread would not notice.
stream.on('close', () => process.kill(process.pid, 'SIGKILL'));
