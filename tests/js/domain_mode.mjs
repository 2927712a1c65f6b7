// What a JavaScript program does with nothing but E2B_DOMAIN and E2B_API_KEY; prints one JSON object.
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create('base', { timeoutMs: 120_000 })
const told = { id: sandbox.sandboxId, host: sandbox.getHost(8080) }
const done = await sandbox.commands.run('echo "from $WHO"; id -un', { envs: { WHO: 'js' } })
told.stdout = done.stdout
await sandbox.files.write('/tmp/a b', 'content é')
told.read = await sandbox.files.read('/tmp/a b')
told.signed = await (await fetch(await sandbox.downloadUrl('/tmp/a b'))).text()
const parts = []
await sandbox.commands.run('for n in 1 2 3; do echo $n; done', { onStdout: (text) => parts.push(text) })
told.streamed = parts.join('')
told.listed = (await Sandbox.list().nextItems()).map((one) => one.sandboxId)
told.killed = await sandbox.kill()
told.running = await sandbox.isRunning()
try {
  await sandbox.commands.run('true')
} catch (error) {
  told.error = `${error.name}: ${error.message}`
}
console.log(JSON.stringify(told))
