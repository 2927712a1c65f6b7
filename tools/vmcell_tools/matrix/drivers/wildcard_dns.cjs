// Wildcard DNS for the clients of a run: every name below `localhost` is this machine.
// Loaded by `node --require`, as sitecustomize.py is by Python.
const dns = require("node:dns");

const lookUp = dns.lookup;

dns.lookup = (name, options, callback) => {
  const here = String(name).replace(/\.$/, "").endsWith(".localhost");
  return lookUp(here ? "127.0.0.1" : name, options, callback);
};
