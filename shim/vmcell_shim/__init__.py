"""containerd's side of a microVM: the shim v2 binary and its server, owner of the VMM's life.

One shim process serves one container in one microVM. `start` is quick and imports next to nothing;
the server it leaves behind answers containerd over ttrpc. Standard library only.

Reading order:
args           containerd's command line: flags in any order, then the action
bundle         what start and delete need of a bundle: group, socket, address
mount_list     a root as mounts that build on each other (containerd 2.2 on)
info           the answers to -info and -v
config         this host's settings: /etc/vmcell/config.toml
journal        log lines for containerd's FIFO and for shim.log
spawn          run a program to its end without subprocess
file_lock      flock with a deadline
living         processes by pid and start time: alive, killed, gone
sandbox_files  the files of one sandbox on the host, and their removal
oci_json       config.json: read with limits, taken apart with names
annotations    the allow-list under io.vmcell.
sizing         how many vCPUs, how much memory
binds          bind mounts of small host files as copies
spec           OCI spec → what to boot and what its guest runs
erofs_superblock  what an EROFS image needs, and how long it is
layers         directories and images that a root is made of
erofs          layers, or one directory → one EROFS image
cached_image   one image of the cache: held, whole or not
cache_collector  what is in the cache, and what of it goes
image_cache    EROFS images by their layers, built once
disk           the sparse ext4 file a container writes to
rootfs         the mounts of Task.Create → images and disks
fifo           containerd's standard streams: FIFOs and log files
pump           bytes from one descriptor to another
stdio          the streams of one process, host side and guest side joined
cgroup_limits  cgroupsPath and resources → a cgroup on the host, and its limits
cgroup         that cgroup: made, joined, removed
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
start          bind, leave the server behind, answer
bootstrap      the binary's main
"""
