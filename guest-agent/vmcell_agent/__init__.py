"""The guest's side of vmcell: PID 1, which runs containers, and envd, E2B's data plane.

PID 1 is one thread around one epoll loop and imports the standard library only; it forks for every
process, so nothing here may start a thread. Its state is rebuilt by nobody: when it ends, the
machine ends.

Reading order:
abi            numbers of the Linux ABI that CPython does not name
syscalls       the system calls that CPython lacks
record         immutable descriptions
attempt        OSError into a sentence
log            lines to the kernel's log, at a bounded rate
eventloop      epoll and timers
jsonfields     typed reads from JSON
capabilities   capability names, bits and sets
liveshare      live directories of the host, taken from the virtio-fs share
mountoptions   mount options as flags and data
ociprocess     `process` of an OCI spec
resources      `linux.resources` of an OCI spec as files of a cgroup
ocispec        the whole OCI spec
cgroup         one container's cgroup v2
cgroupwatch    an events file of a cgroup, followed through the loop
oom            who waits for the OOM killer
freezer        a container that stands still, and goes on
rootfs         a container's root from EROFS and ext4
containerfs    the container's mounts, devices and protected paths, from inside
copyin         files of the host's put into the container
renewal        the same files written again, later
readout        one file of the container, read
credentials    limits, ids, capabilities of a child
program        finding and executing a program
terminal       pseudo terminals
forked         what every forked child does first
report         what a child tells before its program runs
child          a forked child up to execve
spawn          the fork, seen from the agent
pump           bytes from one descriptor to another
door           connections from the host, and what each says first
streamdoor     stream connections
portdoor       port forwards to the guest's loopback
stdio          the standard streams of a process
process        one process, from declaration to exit
reaper         children that have ended
errand         short work in a forked child, so that PID 1 never waits
windows        devices that come after boot
readdress      an interface that is to be another one
network        the guest's interfaces
machine        early mounts, clock, entropy, reset
holder         pid 1 of a pod's pid namespace
pod            what the containers of a guest share
containerfiles  a container's files as the host sees them
limits         a container's limits, changed while it runs
container      one container and its processes
identity       what tells a restored guest from its siblings
snapshot       the guest stands still to be saved, and goes on
service        the methods of agent.proto
control        the ttrpc connection to the host
guest          everything wired to one loop
envd           E2B's data plane (a package of its own)
__main__       PID 1
"""
