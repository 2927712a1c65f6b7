"""containerd's side of a microVM: the shim v2 binary and its server, owner of the VMM's life.

One shim process serves one container in one microVM. `start` is quick and imports next to nothing;
the server it leaves behind answers containerd over ttrpc. Standard library only.

Reading order:
args           containerd's command line: flags in any order, then the action
listening      unix sockets that appear listening, and of which only the dead are replaced
bundle         what start and delete need of a bundle: group, socket, address
info           the answers to -info and -v
config         this host's settings: /etc/vmcell/config.toml
journal        log lines for containerd's FIFO and for shim.log
spawn          run a program to its end without subprocess
living         processes by pid and start time: alive, killed, gone
sandbox_files  the files of one sandbox on the host, and their removal
oci_json       config.json: read with limits, taken apart with names
annotations    the allow-list under io.vmcell.
sizing         how many vCPUs, how much memory
binds          bind mounts of small host files as copies
spec           OCI spec → what to boot and what its guest runs
erofs          image layers → one cached EROFS file
disk           the sparse ext4 file a container writes to
rootfs         the mounts of Task.Create → image and disk
fifo           containerd's standard streams: FIFOs and log files
pump           bytes from one descriptor to another
stdio          the streams of one process, host side and guest side joined
lifecycle      what may be asked of a process in which state
client         a ttrpc client for many threads
events         task events for containerd, in order
tap            the TAP interface an annotation names
guest          one microVM with the agent in it
process        one process as containerd sees it
container      one container in one microVM
metrics        the guest's cgroup numbers for Task.Stats
service        the Task service, v2 and v3
server         a ttrpc server on a unix socket
serve          the life of one shim process
delete         remove what is left of a sandbox
start          bind, answer, become the server
actions        one action of the binary and what comes of it
caller         what a child of the zygote takes over from the process that asked
title          what ps shows of such a child
zygote_stub    start and delete by way of the zygote
zygote_child   a forked process becomes a shim, a delete or a VMM
installed_code  whether what was imported is still what is installed
zygote_loop    connections in, a child for each request
zygote         the node's warm interpreter: its start, renewal and end
bootstrap      the binary's main
"""
