"""Numbers and layouts of <linux/if_tun.h> and <linux/vhost.h>; nothing is called here.

Names are the kernel's. Structs are `struct` formats with native alignment spelt out; a test
compares every size, offset and request number with what a C compiler makes of the headers.
"""

from __future__ import annotations

import struct

_IOC_WRITE = 1
_IOC_READ = 2


def _ioc(direction: int, kind: int, number: int, size_bytes: int) -> int:
    return direction << 30 | size_bytes << 16 | kind << 8 | number


INT = struct.Struct("<i")
U64 = struct.Struct("<Q")

# <linux/if_tun.h>
IFREQ = struct.Struct("<16sH22x")  # struct ifreq as TUNSETIFF reads it: name, flags
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUNSETIFF = _ioc(_IOC_WRITE, ord("T"), 202, INT.size)
TUNSETOFFLOAD = _ioc(_IOC_WRITE, ord("T"), 208, INT.size)
TUNSETVNETHDRSZ = _ioc(_IOC_WRITE, ord("T"), 216, INT.size)

# <linux/vhost.h>, <linux/vhost_types.h>
VHOST_VIRTIO = 0xAF
vhost_vring_state = struct.Struct("<II")  # index, num
vhost_vring_file = struct.Struct("<Ii")  # index, fd
vhost_vring_addr = struct.Struct("<IIQQQQ")  # index, flags, desc, used, avail, log
vhost_memory = struct.Struct("<II")  # nregions, padding
vhost_memory_region = struct.Struct("<QQQQ")  # guest, size, host, padding
VHOST_FILE_UNBIND = -1
VHOST_GET_FEATURES = _ioc(_IOC_READ, VHOST_VIRTIO, 0x00, U64.size)
VHOST_SET_FEATURES = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x00, U64.size)
VHOST_SET_OWNER = _ioc(0, VHOST_VIRTIO, 0x01, 0)
VHOST_SET_MEM_TABLE = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x03, vhost_memory.size)
VHOST_SET_VRING_NUM = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x10, vhost_vring_state.size)
VHOST_SET_VRING_ADDR = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x11, vhost_vring_addr.size)
VHOST_SET_VRING_BASE = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x12, vhost_vring_state.size)
VHOST_GET_VRING_BASE = _ioc(_IOC_READ | _IOC_WRITE, VHOST_VIRTIO, 0x12, vhost_vring_state.size)
VHOST_SET_VRING_KICK = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x20, vhost_vring_file.size)
VHOST_SET_VRING_CALL = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x21, vhost_vring_file.size)
VHOST_NET_SET_BACKEND = _ioc(_IOC_WRITE, VHOST_VIRTIO, 0x30, vhost_vring_file.size)
