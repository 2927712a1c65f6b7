"""The VMM: one process per microVM that drives /dev/kvm and plays the guest's hardware.

The guest is an attacker from its first instruction. What it can do wrong is a `GuestError` and ends
at its device; anything unexpected ends the process with a reason. Standard library only.

Reading order:
page_map       which pages of a mapping are this process's own
memory         guest RAM and read-only file windows, reached by guest address and length only
kvm            declarations, the one checked ioctl, owners of KVM's descriptors
layout         every guest physical address the VMM decides, drawn once
config         what may be asked for: frozen records, their limits, their JSON
size           how large a machine is: what KVM is told of it before anything else
control        messages between the shim and its VMM; no I/O
irq            interrupt lines
bus            addresses to devices, for ports and for memory-mapped windows
loop           the device thread's event loop: descriptors, timers, calls from other threads
boot           everything that stands in memory and registers before the first instruction
frame          a VM of a size, before it has devices or a guest
devices        the few PC devices a Linux without ACPI and PCI wants
virtio         virtio-mmio devices: images, disks, network, directories, sockets, entropy, balloon
ending         why a machine ends: the first cause, and what the kernel said
vcpu           one thread per vCPU: exits to the bus, kicks, what an exit means
clock          the guest's time, which stands still while its vCPUs do
pausing        all vCPUs stand still, and go on
hotplug        devices that come and go at the spare windows
snapshot       the state of a machine as records and JSON; no I/O
saving         a machine that stands still becomes such a state and a file
shedding       pages that are as in the snapshot are given back to it
loading        such a state goes into a machine that has never run
machine        a microVM that exists: run it, count, close
build          the recipe for a machine, new or saved before
answers        what the shim asks of a running machine
seccomp        a filter of system calls, from rules to the kernel's program; no I/O
system_calls   what a VMM may ask of the kernel
jail           what a VMM gives up before its guest runs
vmm            the process around one machine
vmm_uid        a uid that no other living VMM has
rehearsal      a machine of our own, to have its pages copied before anybody waits
spare          a VMM process that waits for its machine
zygote_client  a VMM process forked by the node's zygote
handle         the host's side of that process
"""
