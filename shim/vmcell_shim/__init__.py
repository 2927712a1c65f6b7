"""containerd's side of a microVM: the shim v2 binary and its server, owner of the VMM's life.

One shim process serves one microVM: a container's own, or a pod's with all its containers.
`start` is quick and imports next to nothing; the server it leaves behind answers containerd over
ttrpc. Standard library only.

Reading order:
args               containerd's command line: flags in any order, then the action
listening          unix sockets that appear listening, and of which only the dead are replaced
bundle             what start and delete need of a bundle: group, socket, address
mount_list         a root as mounts that build on each other (containerd 2.2 on)
info               the answers to -info and -v
config             this host's settings: /etc/vmcell/config.toml
journal            log lines for containerd's FIFO and for shim.log
spawn              run a program to its end without subprocess
file_lock          flock with a deadline
oci_json           config.json: read with limits, taken apart with names
living             processes by pid and start time: alive, killed, gone
sparse             files with holes: copied, digested, packed
sandbox_files      the files of one sandbox on the host, and their removal
digests            digests of large files, made once as long as a file stays the same
snapshot_manifest  what a snapshot is of, and the digests of its files
snapshot_store     snapshots of this host: whole or not there, verified when opened
checkpoint_image   a snapshot as containerd's content store carries it
saved_container    what a container goes on from, where one is named
mount_calls        mount calls that CPython lacks, in other namespaces too
virtiofsd          the daemon that serves live directories
share              the live directories of one sandbox
annotations        the allow-list under io.vmcell.
sizing             how many vCPUs, how much memory
binds              bind mounts: copies and live shares
refresh            copies kept like their sources
tap                TAP interfaces as descriptors
rtnetlink_socket   a socket to one namespace's routing tables
netns              network namespaces of the host
interfaces         a namespace's interfaces as the guest shall have them
pod_network        a TAP beside each interface of a namespace, joined by redirects
hooks              OCI hooks of the runtime's namespace
relay              two sockets joined both ways
port_forward       connections to a pod's loopback, carried into its guest
disk               the sparse ext4 file a container writes to, and block devices
shape              what a VMM is asked to build
sandbox_network    the network of one sandbox on the host
spec               OCI spec → what to boot and what its guest runs
erofs_superblock   what an EROFS image needs, and how long it is
layers             directories and images that a root is made of
erofs              layers, or one directory → one EROFS image
cached_image       one image of the cache: held, whole or not
cache_collector    what is in the cache, and what of it goes
image_cache        EROFS images by their layers, built once
rootfs             the mounts of Task.Create → images and disks
fifo               containerd's standard streams: FIFOs and log files
log_binary         logging programs: binary:// and binary-v2://
pump               bytes from one descriptor to another
stdio              the streams of one process, host side and guest side joined
cgroup_limits      cgroupsPath and resources → a cgroup on the host, and its limits
cgroup             that cgroup: made, joined, removed
lifecycle          what may be asked of a process in which state
client             a ttrpc client for many threads
events             task events for containerd, in order
guest              one microVM with the agent in it
checkpoint         a container that runs becomes a snapshot
adoption           a guest that was saved takes a container's name, files and limits
oom_watch          what a guest's OOM killer did, told once
process            one process as containerd sees it
signals            signals to it; SIGKILL needs no consent
sandbox            one microVM and what it has on the host
footprint          what a container has beside its processes
container          one container in a microVM
saving             Task.Checkpoint: saved, then on, paused or ended
pause              a pod's sandbox container, which runs nothing
registry           the sandbox and the containers of one shim
metrics            the guest's cgroup numbers for Task.Stats
service            the Task service, v2 and v3
pod_config         a pod's configuration as the spec of its sandbox container
sandbox_service    containerd's sandbox API
dispatch           service names to services
server             a ttrpc server on a unix socket
serve              the life of one shim process
delete             remove what is left of a sandbox
start              bind, answer, become the server
actions            one action of the binary and what comes of it
caller             what a child of the zygote takes over from the process that asked
title              what ps shows of such a child
zygote_stub        start and delete by way of the zygote
spares             VMMs that are ready before anybody asks, kept by the zygote
zygote_child       a forked process becomes a shim, a delete, a VMM, or one that waits to be one
installed_code     whether what was imported is still what is installed
zygote_loop        connections in, a child for each request
zygote             the node's warm interpreter: its start, renewal and end
bootstrap          the binary's main
"""
