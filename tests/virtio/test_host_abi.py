"""Numbers and layouts of ours against what a C compiler makes of the kernel's headers."""

from __future__ import annotations

import struct
import subprocess

import pytest

from vmcell_runtime.virtio import abi, blk, host_abi, net
from vmcell_runtime.virtio.vsock import packet

HEADERS = [
    "stddef.h",
    "stdio.h",
    "sys/ioctl.h",
    "net/if.h",
    "linux/if_tun.h",
    "linux/vhost.h",
    "linux/virtio_blk.h",
    "linux/virtio_config.h",
    "linux/virtio_ids.h",
    "linux/virtio_mmio.h",
    "linux/virtio_net.h",
    "linux/virtio_pmem.h",
    "linux/virtio_ring.h",
    "linux/virtio_vsock.h",
]

# The C expression, and what we say it is.
EXPECTED: dict[str, int] = {
    "TUNSETIFF": host_abi.TUNSETIFF,
    "TUNSETOFFLOAD": host_abi.TUNSETOFFLOAD,
    "TUNSETVNETHDRSZ": host_abi.TUNSETVNETHDRSZ,
    "IFF_TAP": host_abi.IFF_TAP,
    "IFF_NO_PI": host_abi.IFF_NO_PI,
    "IFF_VNET_HDR": host_abi.IFF_VNET_HDR,
    "IFF_TUN_EXCL": host_abi.IFF_TUN_EXCL,
    "TUN_F_CSUM": host_abi.TUN_F_CSUM,
    "TUN_F_TSO4": host_abi.TUN_F_TSO4,
    "TUN_F_TSO6": host_abi.TUN_F_TSO6,
    "sizeof(struct ifreq)": host_abi.IFREQ.size,
    "offsetof(struct ifreq, ifr_flags)": 16,
    "VHOST_GET_FEATURES": host_abi.VHOST_GET_FEATURES,
    "VHOST_SET_FEATURES": host_abi.VHOST_SET_FEATURES,
    "VHOST_SET_OWNER": host_abi.VHOST_SET_OWNER,
    "VHOST_SET_MEM_TABLE": host_abi.VHOST_SET_MEM_TABLE,
    "VHOST_SET_VRING_NUM": host_abi.VHOST_SET_VRING_NUM,
    "VHOST_SET_VRING_ADDR": host_abi.VHOST_SET_VRING_ADDR,
    "VHOST_SET_VRING_BASE": host_abi.VHOST_SET_VRING_BASE,
    "VHOST_SET_VRING_KICK": host_abi.VHOST_SET_VRING_KICK,
    "VHOST_SET_VRING_CALL": host_abi.VHOST_SET_VRING_CALL,
    "VHOST_NET_SET_BACKEND": host_abi.VHOST_NET_SET_BACKEND,
    "VHOST_FILE_UNBIND": host_abi.VHOST_FILE_UNBIND,
    "offsetof(struct vhost_vring_addr, desc_user_addr)": 8,
    "offsetof(struct vhost_vring_addr, used_user_addr)": 16,
    "offsetof(struct vhost_vring_addr, avail_user_addr)": 24,
    "offsetof(struct vhost_vring_addr, log_guest_addr)": 32,
    "offsetof(struct vhost_memory, regions)": host_abi.vhost_memory.size,
    "sizeof(struct vhost_memory_region)": host_abi.vhost_memory_region.size,
    "offsetof(struct vhost_memory_region, userspace_addr)": 16,
    "offsetof(struct virtio_blk_config, max_secure_erase_sectors)": blk._CONFIG_HEAD.size,
    "offsetof(struct virtio_blk_config, size_max)": 8,
    "offsetof(struct virtio_blk_config, seg_max)": 12,
    "offsetof(struct virtio_blk_config, blk_size)": 20,
    "offsetof(struct virtio_blk_config, num_queues)": 34,
    "offsetof(struct virtio_blk_config, max_discard_sectors)": 36,
    "offsetof(struct virtio_blk_config, max_write_zeroes_sectors)": 48,
    "offsetof(struct virtio_blk_config, write_zeroes_may_unmap)": 56,
    "VIRTIO_BLK_T_IN": blk.T_IN,
    "VIRTIO_BLK_T_OUT": blk.T_OUT,
    "VIRTIO_BLK_T_FLUSH": blk.T_FLUSH,
    "VIRTIO_BLK_T_GET_ID": blk.T_GET_ID,
    "VIRTIO_BLK_T_DISCARD": blk.T_DISCARD,
    "VIRTIO_BLK_T_WRITE_ZEROES": blk.T_WRITE_ZEROES,
    "VIRTIO_BLK_ID_BYTES": blk.SERIAL_BYTES,
    "1 << VIRTIO_BLK_F_RO": blk.F_RO,
    "1 << VIRTIO_BLK_F_SEG_MAX": blk.F_SEG_MAX,
    "1 << VIRTIO_BLK_F_SIZE_MAX": blk.F_SIZE_MAX,
    "1 << VIRTIO_BLK_F_BLK_SIZE": blk.F_BLK_SIZE,
    "1 << VIRTIO_BLK_F_FLUSH": blk.F_FLUSH,
    "1 << VIRTIO_BLK_F_DISCARD": blk.F_DISCARD,
    "1 << VIRTIO_BLK_F_WRITE_ZEROES": blk.F_WRITE_ZEROES,
    "sizeof(struct virtio_net_hdr_mrg_rxbuf)": net.HEADER.size,
    "offsetof(struct virtio_net_hdr_mrg_rxbuf, num_buffers)": net.NUM_BUFFERS_OFFSET,
    "offsetof(struct virtio_net_config, mtu)": 10,
    "1 << VIRTIO_NET_F_CSUM": net.F_CSUM,
    "1 << VIRTIO_NET_F_GUEST_CSUM": net.F_GUEST_CSUM,
    "1 << VIRTIO_NET_F_MTU": net.F_MTU,
    "1 << VIRTIO_NET_F_MAC": net.F_MAC,
    "1 << VIRTIO_NET_F_GUEST_TSO4": net.F_GUEST_TSO4,
    "1 << VIRTIO_NET_F_GUEST_TSO6": net.F_GUEST_TSO6,
    "1 << VIRTIO_NET_F_HOST_TSO4": net.F_HOST_TSO4,
    "1 << VIRTIO_NET_F_HOST_TSO6": net.F_HOST_TSO6,
    "1 << VIRTIO_NET_F_MRG_RXBUF": net.F_MRG_RXBUF,
    "VIRTIO_NET_HDR_GSO_TCPV4": net.GSO_TCPV4,
    "VIRTIO_NET_HDR_GSO_TCPV6": net.GSO_TCPV6,
    "sizeof(struct virtio_vsock_hdr)": packet.HEADER_BYTES,
    "offsetof(struct virtio_vsock_hdr, op)": 30,
    "offsetof(struct virtio_vsock_hdr, fwd_cnt)": 40,
    "VIRTIO_VSOCK_OP_SHUTDOWN": packet.OP_SHUTDOWN,
    "VIRTIO_VSOCK_OP_CREDIT_REQUEST": packet.OP_CREDIT_REQUEST,
    "VIRTIO_VSOCK_SHUTDOWN_RCV": packet.SHUTDOWN_RECEIVE,
    "VIRTIO_VSOCK_SHUTDOWN_SEND": packet.SHUTDOWN_SEND,
    "sizeof(struct virtio_pmem_config)": 16,
    "sizeof(struct virtio_pmem_req)": 4,
    "sizeof(struct virtio_pmem_resp)": 4,
    "VIRTIO_ID_NET": abi.DEVICE_ID_NET,
    "VIRTIO_ID_BLOCK": abi.DEVICE_ID_BLOCK,
    "VIRTIO_ID_RNG": abi.DEVICE_ID_ENTROPY,
    "VIRTIO_ID_VSOCK": abi.DEVICE_ID_SOCKET,
    "VIRTIO_ID_PMEM": abi.DEVICE_ID_PMEM,
    "1LL << VIRTIO_F_VERSION_1": abi.F_VERSION_1,
    "1 << VIRTIO_RING_F_EVENT_IDX": abi.F_EVENT_IDX,
    "1 << VIRTIO_RING_F_INDIRECT_DESC": abi.F_INDIRECT_DESC,
    "sizeof(struct vring_desc)": struct.calcsize(abi.DESCRIPTOR_FORMAT),
    "offsetof(struct vring_desc, flags)": 12,
    "VRING_DESC_F_NEXT": abi.DESCRIPTOR_NEXT,
    "VRING_DESC_F_WRITE": abi.DESCRIPTOR_WRITE,
    "VRING_DESC_F_INDIRECT": abi.DESCRIPTOR_INDIRECT,
    "VIRTIO_MMIO_QUEUE_NUM_MAX": abi.MMIO_QUEUE_SIZE_MAX,
    "VIRTIO_MMIO_QUEUE_NUM": abi.MMIO_QUEUE_SIZE,
    "VIRTIO_MMIO_QUEUE_READY": abi.MMIO_QUEUE_READY,
    "VIRTIO_MMIO_QUEUE_NOTIFY": abi.MMIO_QUEUE_NOTIFY,
    "VIRTIO_MMIO_INTERRUPT_STATUS": abi.MMIO_INTERRUPT_STATUS,
    "VIRTIO_MMIO_INTERRUPT_ACK": abi.MMIO_INTERRUPT_ACK,
    "VIRTIO_MMIO_STATUS": abi.MMIO_STATUS,
    "VIRTIO_MMIO_QUEUE_DESC_HIGH": abi.MMIO_QUEUE_DESCRIPTOR_HIGH,
    "VIRTIO_MMIO_QUEUE_AVAIL_LOW": abi.MMIO_QUEUE_DRIVER_LOW,
    "VIRTIO_MMIO_QUEUE_USED_HIGH": abi.MMIO_QUEUE_DEVICE_HIGH,
    "VIRTIO_MMIO_SHM_SEL": abi.MMIO_SHM_SELECT,
    "VIRTIO_MMIO_CONFIG_GENERATION": abi.MMIO_CONFIG_GENERATION,
    "VIRTIO_MMIO_CONFIG": abi.MMIO_CONFIG,
    "VIRTIO_CONFIG_S_NEEDS_RESET": abi.STATUS_NEEDS_RESET,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Every expression as the C compiler sees it."""
    folder = tmp_path_factory.mktemp("probe")
    lines = [f"#include <{header}>" for header in HEADERS]
    lines += ["int main(void) {"]
    lines += [f'  printf("%lld\\n", (long long)({expression}));' for expression in EXPECTED]
    lines += ["  return 0;", "}"]
    source = folder / "probe.c"
    source.write_text("\n".join(lines))
    program = folder / "probe"
    subprocess.run(["cc", "-o", program, source], check=True, timeout=60)
    output = subprocess.run([program], check=True, timeout=10, capture_output=True, text=True)
    return dict(zip(EXPECTED, map(int, output.stdout.split()), strict=True))


@pytest.mark.parametrize("expression", EXPECTED)
def test_as_the_compiler_has_it(compiled: dict[str, int], expression: str) -> None:
    assert compiled[expression] == EXPECTED[expression]
