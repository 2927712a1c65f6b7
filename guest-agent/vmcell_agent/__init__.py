"""The guest's side of vmcell: PID 1, which runs containers, and envd, E2B's data plane.

PID 1 is one thread around one epoll loop and imports the standard library only; it forks for every
process, so nothing here may start a thread. Its state is rebuilt by nobody: when it ends, the
machine ends.

Reading order:
abi            numbers of the Linux ABI that CPython does not name
syscalls       the system calls that CPython lacks
attempt        OSError into a sentence
log            lines to the kernel's log, at a bounded rate
eventloop      epoll and timers
jsonfields     typed reads from JSON
capabilities   capability names, bits and sets
mountoptions   mount options as flags and data
ociprocess     `process` of an OCI spec
ocispec        the whole OCI spec
cgroup         one container's cgroup v2
rootfs         a container's root from EROFS and ext4
containerfs    the container's mounts, devices and protected paths, from inside
copyin         files of the host's put into the container
credentials    limits, ids, capabilities of a child
program        finding and executing a program
terminal       pseudo terminals
report         what a child tells before its program runs
child          a forked child up to execve
spawn          the fork, seen from the agent
pump           bytes from one descriptor to another
streamdoor     stream connections from the host
stdio          the standard streams of a process
process        one process, from declaration to exit
reaper         children that have ended
network        the guest's interfaces
machine        early mounts, clock, entropy, reset
container      one container and its processes
service        the methods of agent.proto
control        the ttrpc connection to the host
guest          everything wired to one loop
envd           E2B's data plane (a package of its own)
__main__       PID 1
"""
