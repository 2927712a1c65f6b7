"""Virtio 1.2 devices behind virtio-mmio windows: image, disk, network, directory, socket, balloon.

A device is plain Python over guest memory and host descriptors; it knows neither KVM nor the
window it stands behind. What a guest gets wrong is a GuestError and stops that one device.

Reading order:
abi             numbers of the specification that several modules need
spans           guest buffers as pieces: cut, read, write
queue           the split virtqueue, every byte of the guest's copied once and checked
status          device status as a table
saved           a transport's state as records
reporter        lines for the operator's log, rationed
device          what a device is, and its way back to the driver
mmio            the register window: features, queues, status, interrupts
window          a window whose device may come and go
rng             entropy
pmem            where a read-only image is mapped
blk             a raw disk
balloon         memory the guest gives back
host_abi        numbers of <linux/if_tun.h> and <linux/vhost.h>
host_ioctl      ioctl on TAP and vhost descriptors, sizes checked
vhost_net       the kernel's own path between the queues and a TAP
net             a network interface over a TAP
vhost_user_abi  messages of the vhost-user protocol; no I/O
vhost_user      its front-end: a daemon of the host serves the queues
unanswered      what a device that died had not given back
fs              a shared directory, served by such a daemon
vsock           streams between guest ports and host sockets
"""
