// Resolves names below .localhost to the loopback, as systemd-resolved does and plain glibc does not.
const dns = require('node:dns')

const lookup = dns.lookup
dns.lookup = (name, options, callback) => {
  const done = callback ?? options
  const wanted = callback ? options : {}
  if (!name.endsWith('.localhost')) return lookup(name, options, callback)
  if (wanted.all) return process.nextTick(done, null, [{ address: '127.0.0.1', family: 4 }])
  return process.nextTick(done, null, '127.0.0.1', 4)
}
