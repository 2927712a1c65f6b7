"""Every number and layout of ours against what a C compiler makes of the kernel's headers (MS4).

What is declared in these modules and compared with nothing fails too, unless it is ours to choose
or stands in no header: those have their reason here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType

import pytest
from c_probe import declared_in, layout, values

from vmcell_runtime import memory, page_map
from vmcell_runtime.boot import elf, params
from vmcell_runtime.virtio import (
    abi,
    balloon,
    blk,
    fs,
    host_abi,
    net,
    pmem,
    unanswered,
    vhost_user_abi,
)
from vmcell_runtime.virtio.vsock import packet

HEADERS = [
    "sys/ioctl.h",
    "sys/mman.h",
    "net/if.h",
    "elf.h",
    "asm/bootparam.h",
    "linux/falloc.h",
    "linux/fuse.h",
    "linux/if_tun.h",
    "limits.h",
    "linux/vhost.h",
    "linux/vhost_types.h",
    "linux/virtio_balloon.h",
    "linux/virtio_blk.h",
    "linux/virtio_config.h",
    "linux/virtio_fs.h",
    "linux/virtio_ids.h",
    "linux/virtio_mmio.h",
    "linux/virtio_net.h",
    "linux/virtio_pmem.h",
    "linux/virtio_ring.h",
    "linux/virtio_vsock.h",
    "linux/vm_sockets.h",
    "linux/if_ether.h",
    "linux/if_vlan.h",
]


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def prefixed(prefix: str, *names: str) -> dict[str, str]:
    return {name: prefix + name for name in names}


def bits(prefix: str, *names: str) -> dict[str, str]:
    return {name: f"1LL << {prefix}{name}" for name in names}


def offset(kind: str, *rows: tuple[str, str]) -> dict[str, str]:
    return {name: f"offsetof(struct {kind}, {field})" for name, field in rows}


# module → our name → the C expression
NUMBERS: dict[ModuleType, dict[str, str]] = {
    host_abi: {
        **same("TUNSETIFF", "TUNSETOFFLOAD", "TUNSETVNETHDRSZ"),
        **same("IFF_TAP", "IFF_NO_PI", "IFF_VNET_HDR", "IFF_TUN_EXCL"),
        **same("TUN_F_CSUM", "TUN_F_TSO4", "TUN_F_TSO6", "VHOST_VIRTIO", "VHOST_FILE_UNBIND"),
        **same("VHOST_GET_FEATURES", "VHOST_SET_FEATURES", "VHOST_SET_OWNER"),
        **same("VHOST_SET_MEM_TABLE", "VHOST_SET_VRING_NUM", "VHOST_SET_VRING_ADDR"),
        **same("VHOST_SET_VRING_BASE", "VHOST_GET_VRING_BASE", "VHOST_SET_VRING_KICK"),
        **same("VHOST_SET_VRING_CALL", "VHOST_NET_SET_BACKEND"),
        **prefixed("", "_IOC_WRITE", "_IOC_READ"),
    },
    abi: {
        "DEVICE_ID_NET": "VIRTIO_ID_NET",
        "DEVICE_ID_BLOCK": "VIRTIO_ID_BLOCK",
        "DEVICE_ID_ENTROPY": "VIRTIO_ID_RNG",
        "DEVICE_ID_BALLOON": "VIRTIO_ID_BALLOON",
        "DEVICE_ID_SOCKET": "VIRTIO_ID_VSOCK",
        "DEVICE_ID_FS": "VIRTIO_ID_FS",
        "DEVICE_ID_PMEM": "VIRTIO_ID_PMEM",
        **{
            f"STATUS_{name}": f"VIRTIO_CONFIG_S_{name}"
            for name in ("ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK", "NEEDS_RESET")
        },
        "STATUS_FAILED": "VIRTIO_CONFIG_S_FAILED",
        "F_INDIRECT_DESC": "1 << VIRTIO_RING_F_INDIRECT_DESC",
        "F_EVENT_IDX": "1 << VIRTIO_RING_F_EVENT_IDX",
        "F_VERSION_1": "1LL << VIRTIO_F_VERSION_1",
        "DESCRIPTOR_BYTES": "sizeof(struct vring_desc)",
        "DESCRIPTOR_NEXT": "VRING_DESC_F_NEXT",
        "DESCRIPTOR_WRITE": "VRING_DESC_F_WRITE",
        "DESCRIPTOR_INDIRECT": "VRING_DESC_F_INDIRECT",
        "AVAIL_NO_INTERRUPT": "VRING_AVAIL_F_NO_INTERRUPT",
        "USED_NO_NOTIFY": "VRING_USED_F_NO_NOTIFY",
        "USED_ELEMENT_BYTES": "sizeof(struct vring_used_elem)",
        "MMIO_MAGIC": "VIRTIO_MMIO_MAGIC_VALUE",
        "MMIO_VERSION": "VIRTIO_MMIO_VERSION",
        "MMIO_DEVICE_ID": "VIRTIO_MMIO_DEVICE_ID",
        "MMIO_VENDOR_ID": "VIRTIO_MMIO_VENDOR_ID",
        "MMIO_DEVICE_FEATURES": "VIRTIO_MMIO_DEVICE_FEATURES",
        "MMIO_DEVICE_FEATURES_SELECT": "VIRTIO_MMIO_DEVICE_FEATURES_SEL",
        "MMIO_DRIVER_FEATURES": "VIRTIO_MMIO_DRIVER_FEATURES",
        "MMIO_DRIVER_FEATURES_SELECT": "VIRTIO_MMIO_DRIVER_FEATURES_SEL",
        "MMIO_QUEUE_SELECT": "VIRTIO_MMIO_QUEUE_SEL",
        "MMIO_QUEUE_SIZE_MAX": "VIRTIO_MMIO_QUEUE_NUM_MAX",
        "MMIO_QUEUE_SIZE": "VIRTIO_MMIO_QUEUE_NUM",
        "MMIO_QUEUE_READY": "VIRTIO_MMIO_QUEUE_READY",
        "MMIO_QUEUE_NOTIFY": "VIRTIO_MMIO_QUEUE_NOTIFY",
        "MMIO_INTERRUPT_STATUS": "VIRTIO_MMIO_INTERRUPT_STATUS",
        "MMIO_INTERRUPT_ACK": "VIRTIO_MMIO_INTERRUPT_ACK",
        "MMIO_STATUS": "VIRTIO_MMIO_STATUS",
        **{
            f"MMIO_QUEUE_{ours}_{half}": f"VIRTIO_MMIO_QUEUE_{theirs}_{half}"
            for ours, theirs in (("DESCRIPTOR", "DESC"), ("DRIVER", "AVAIL"), ("DEVICE", "USED"))
            for half in ("LOW", "HIGH")
        },
        "MMIO_SHM_SELECT": "VIRTIO_MMIO_SHM_SEL",
        "MMIO_SHM_LENGTH_LOW": "VIRTIO_MMIO_SHM_LEN_LOW",
        "MMIO_SHM_LENGTH_HIGH": "VIRTIO_MMIO_SHM_LEN_HIGH",
        "MMIO_SHM_BASE_LOW": "VIRTIO_MMIO_SHM_BASE_LOW",
        "MMIO_SHM_BASE_HIGH": "VIRTIO_MMIO_SHM_BASE_HIGH",
        "MMIO_CONFIG_GENERATION": "VIRTIO_MMIO_CONFIG_GENERATION",
        "MMIO_CONFIG": "VIRTIO_MMIO_CONFIG",
        "INTERRUPT_USED_BUFFER": "VIRTIO_MMIO_INT_VRING",
        "INTERRUPT_CONFIG_CHANGE": "VIRTIO_MMIO_INT_CONFIG",
    },
    blk: {
        **bits("VIRTIO_BLK_", "F_SIZE_MAX", "F_SEG_MAX", "F_RO", "F_BLK_SIZE", "F_FLUSH"),
        **bits("VIRTIO_BLK_", "F_DISCARD", "F_WRITE_ZEROES"),
        **prefixed("VIRTIO_BLK_", "T_IN", "T_OUT", "T_FLUSH", "T_GET_ID", "T_DISCARD"),
        **prefixed("VIRTIO_BLK_", "T_WRITE_ZEROES", "S_OK", "S_IOERR", "S_UNSUPP"),
        "SERIAL_BYTES": "VIRTIO_BLK_ID_BYTES",
        "WRITE_ZEROES_UNMAP": "VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP",
        **same("FALLOC_FL_KEEP_SIZE", "FALLOC_FL_PUNCH_HOLE", "FALLOC_FL_ZERO_RANGE"),
    },
    net: {
        **bits("VIRTIO_NET_", "F_CSUM", "F_GUEST_CSUM", "F_MTU", "F_MAC", "F_GUEST_TSO4"),
        **bits("VIRTIO_NET_", "F_GUEST_TSO6", "F_HOST_TSO4", "F_HOST_TSO6", "F_MRG_RXBUF"),
        "HEADER_FLAG_NEEDS_CSUM": "VIRTIO_NET_HDR_F_NEEDS_CSUM",
        "GSO_NONE": "VIRTIO_NET_HDR_GSO_NONE",
        "GSO_TCPV4": "VIRTIO_NET_HDR_GSO_TCPV4",
        "GSO_TCPV6": "VIRTIO_NET_HDR_GSO_TCPV6",
        "NUM_BUFFERS_OFFSET": "offsetof(struct virtio_net_hdr_mrg_rxbuf, num_buffers)",
        "ETHERNET_BYTES": "ETH_HLEN",
        "MIN_MTU": "ETH_MIN_MTU",
        "MAX_MTU": "ETH_MAX_MTU",
    },
    packet: {
        "HOST_CID": "VMADDR_CID_HOST",
        "TYPE_STREAM": "VIRTIO_VSOCK_TYPE_STREAM",
        **prefixed("VIRTIO_VSOCK_", "OP_REQUEST", "OP_RESPONSE", "OP_RST", "OP_SHUTDOWN"),
        **prefixed("VIRTIO_VSOCK_", "OP_RW", "OP_CREDIT_UPDATE", "OP_CREDIT_REQUEST"),
        "SHUTDOWN_RECEIVE": "VIRTIO_VSOCK_SHUTDOWN_RCV",
        "SHUTDOWN_SEND": "VIRTIO_VSOCK_SHUTDOWN_SEND",
        "HEADER_BYTES": "sizeof(struct virtio_vsock_hdr)",
    },
    pmem: {"REQUEST_FLUSH": "VIRTIO_PMEM_REQ_TYPE_FLUSH"},
    balloon: {
        "F_DEFLATE_ON_OOM": "1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM",
        "F_REPORTING": "1 << VIRTIO_BALLOON_F_REPORTING",
        "_ACTUAL_OFFSET": "offsetof(struct virtio_balloon_config, actual)",
        "PAGES_PER_MIB": "(1 << 20) >> VIRTIO_BALLOON_PFN_SHIFT",
    },
    fs: {"TAG_BYTES": "sizeof(((struct virtio_fs_config *)0)->tag)"},
    vhost_user_abi: {},
    unanswered: {},
    memory: {
        **same("MAP_NORESERVE", "MAP_FIXED"),
        "MAX_SPANS": "IOV_MAX",
        "_READ_WRITE": "PROT_READ | PROT_WRITE",
    },
    page_map: {},
    params: {
        "BOOT_PARAMS_BYTES": "sizeof(struct boot_params)",
        **offset(
            "boot_params",
            ("_E820_COUNT", "e820_entries"),
            ("_BOOT_FLAG", "hdr.boot_flag"),
            ("_HEADER_MAGIC", "hdr.header"),
            ("_LOADER_TYPE", "hdr.type_of_loader"),
            ("_COMMAND_LINE", "hdr.cmd_line_ptr"),
            ("_KERNEL_ALIGNMENT", "hdr.kernel_alignment"),
            ("_COMMAND_LINE_SIZE", "hdr.cmdline_size"),
            ("_E820_TABLE", "e820_table"),
        ),
    },
    elf: {"_ET_EXEC": "ET_EXEC", "_EM_X86_64": "EM_X86_64", "_PT_LOAD": "PT_LOAD"},
}

VHOST_ROWS = {
    "_VRING_STATE": ("struct vhost_vring_state", "index num"),
    "_VRING_ADDR": (
        "struct vhost_vring_addr",
        "index flags desc_user_addr used_user_addr avail_user_addr log_guest_addr",
    ),
    "_REGIONS": ("struct vhost_memory", "nregions padding"),
    "_REGION": (
        "struct vhost_memory_region",
        "guest_phys_addr memory_size userspace_addr flags_padding",
    ),
}
BLK_CONFIG = (
    "capacity size_max seg_max geometry.cylinders geometry.heads geometry.sectors blk_size "
    "physical_block_exp alignment_offset min_io_size opt_io_size wce unused num_queues "
    "max_discard_sectors max_discard_seg discard_sector_alignment max_write_zeroes_sectors "
    "max_write_zeroes_seg write_zeroes_may_unmap"
)
ELF_HEADER = (
    "e_ident e_type e_machine e_version e_entry e_phoff e_shoff e_flags e_ehsize e_phentsize "
    "e_phnum e_shentsize e_shnum e_shstrndx"
)

# module → our struct → C's, and its fields in our order
STRUCTS: dict[ModuleType, dict[str, tuple[str, str]]] = {
    host_abi: {
        "IFREQ": ("struct ifreq", "ifr_name ifr_flags"),
        "vhost_vring_state": VHOST_ROWS["_VRING_STATE"],
        "vhost_vring_file": ("struct vhost_vring_file", "index fd"),
        "vhost_vring_addr": VHOST_ROWS["_VRING_ADDR"],
        "vhost_memory": VHOST_ROWS["_REGIONS"],
        "vhost_memory_region": VHOST_ROWS["_REGION"],
    },
    blk: {
        "_HEADER": ("struct virtio_blk_outhdr", "type ioprio sector"),
        "_RANGE": ("struct virtio_blk_discard_write_zeroes", "sector num_sectors flags"),
        "_CONFIG_HEAD": ("struct virtio_blk_config", BLK_CONFIG),
    },
    net: {
        "HEADER": (
            "struct virtio_net_hdr_mrg_rxbuf",
            "hdr.flags hdr.gso_type hdr.hdr_len hdr.gso_size hdr.csum_start hdr.csum_offset "
            "num_buffers",
        )
    },
    packet: {
        "_HEADER": (
            "struct virtio_vsock_hdr",
            "src_cid dst_cid src_port dst_port len type op flags buf_alloc fwd_cnt",
        )
    },
    pmem: {"_WORD": ("struct virtio_pmem_req", "type")},
    fs: {"_CONFIG": ("struct virtio_fs_config", "tag num_request_queues")},
    unanswered: {
        "FUSE_IN_HEADER": ("struct fuse_in_header", "len opcode unique"),
        "FUSE_OUT_HEADER": ("struct fuse_out_header", "len error unique"),
    },
    vhost_user_abi: VHOST_ROWS,
    elf: {
        "_HEADER": ("Elf64_Ehdr", ELF_HEADER),
        "_SEGMENT": (
            "Elf64_Phdr",
            "p_type p_flags p_offset p_vaddr p_paddr p_filesz p_memsz p_align",
        ),
    },
}
# Formats that stand in the code without a name: what the configuration spaces are packed by.
UNNAMED = [
    ("<6sHHH", "struct virtio_net_config", "mac status max_virtqueue_pairs mtu"),
    ("<QQ", "struct virtio_pmem_config", "start size"),
    ("<Q", "struct virtio_vsock_config", "guest_cid"),
    ("<I", "struct virtio_vsock_event", "id"),
    ("<I", "struct virtio_pmem_resp", "ret"),
    ("<II", "struct virtio_balloon_config", "num_pages actual"),
    ("<II", "struct vring_used_elem", "id len"),
    ("<QQI", "struct boot_e820_entry", "addr size type"),
    (abi.DESCRIPTOR_FORMAT, "struct vring_desc", "addr len flags next"),
]
# Where only the beginning of C's struct is ours: up to this field.
PARTS = {"_CONFIG_HEAD": "offsetof(struct virtio_blk_config, max_secure_erase_sectors)"}

OURS = "ours to choose, within the specification"
NOT_IN_LINUX = "QEMU's docs/interop/vhost-user.rst; Linux has no header of it"
OWN: dict[ModuleType, dict[str, str]] = {
    host_abi: {"INT": "a C int", "U64": "a __u64"},
    abi: {
        "DEVICE_ID_NONE": "virtio 1.2 § 4.2.2",
        "STATUS_RESET": "virtio 1.2 § 2.1",
        "MMIO_MAGIC_VALUE": "virtio 1.2 § 4.2.2",
        "MMIO_VERSION_VALUE": "virtio 1.2 § 4.2.2",
        "MMIO_VENDOR_VALUE": OURS,
        "NOTIFY_BYTES": "virtio 1.2 § 4.2.2: registers have 32 bits",
    },
    blk: dict.fromkeys(
        ("SECTOR_BYTES", "SEGMENT_MAX_BYTES", "SEGMENTS_MAX", "MAX_DATA_BYTES"), OURS
    )
    | {"MAX_RANGE_SECTORS": OURS},
    net: {
        "VLAN_BYTES": "linux/if_vlan.h has it for the kernel alone",
        "MAX_FRAME_BYTES": OURS,
        "RX": "virtio 1.2 § 5.1.2",
        "TX": "virtio 1.2 § 5.1.2",
        "_NUM_BUFFERS": "the last field of HEADER",
    },
    packet: {"MAX_PAYLOAD_BYTES": OURS},
    pmem: {"RESPONSE_OK": "virtio 1.2 § 5.19.7", "RESPONSE_BAD": "virtio 1.2 § 5.19.7"},
    balloon: dict.fromkeys(("MAX_NUMBERS_BYTES", "MAX_REPORT_BYTES"), OURS)
    | dict.fromkeys(("INFLATE", "DEFLATE", "REPORTING"), "virtio 1.2 § 5.5.2"),
    fs: {"REQUEST_QUEUES": OURS},
    unanswered: {},
    vhost_user_abi: {
        name: NOT_IN_LINUX
        for name in vars(vhost_user_abi)
        if name.startswith(("FLAG", "GET_", "SET_", "F_PROTOCOL", "PROTOCOL_F", "MAX_"))
        or name in ("HEADER", "ANSWER_BYTES", "_U64")
    },
    memory: {
        name: OURS
        for name in ("HUGE_PAGE_BYTES", "LOW_RAM_LIMIT_BYTES", "HIGH_RAM_GPA", "_WRITE_BYTES")
    }
    | {"_READ_WRITE": "two of Python's own mmap.PROT_ in one"},
    page_map: {"PAGE_BYTES": "x86-64", "_ENTRY_BYTES": "Documentation/admin-guide/mm/pagemap.rst"},
    params: {
        "E820_RAM": "asm/e820/types.h, not for user space",
        "E820_RESERVED": "asm/e820/types.h, not for user space",
        "_LOADER_UNDEFINED": "Documentation/arch/x86/boot.rst, type_of_loader",
    },
    elf: {"_MAX_SEGMENTS": OURS},
}


def expectations() -> dict[str, int]:
    """C expression → what we say it is."""
    wanted: dict[str, int] = {}
    for module, rows in NUMBERS.items():
        for ours, expression in rows.items():
            wanted[expression] = getattr(module, ours)
    for module, structs in STRUCTS.items():
        for ours, (name, fields) in structs.items():
            kind: struct.Struct = getattr(module, ours)
            wanted |= layout(kind, name, fields.split())
            wanted[PARTS.get(ours, f"sizeof({name})")] = kind.size
    for text, name, fields in UNNAMED:
        wanted |= layout(text, name, fields.split())
    for name in ("vring_desc", "vring_used_elem", "boot_e820_entry"):
        wanted[f"sizeof(struct {name})"] = {"vring_desc": 16, "vring_used_elem": 8}.get(name, 20)
    return wanted


EXPECTED = expectations()


def test_all_is_as_the_compiler_has_it(tmp_path: Path) -> None:
    found = values(HEADERS, list(EXPECTED), tmp_path)
    wrong = {text: (EXPECTED[text], value) for text, value in found.items()}
    wrong = {text: pair for text, pair in wrong.items() if pair[0] != pair[1]}
    assert not wrong, f"ours, the compiler's: {wrong}"
    assert len(EXPECTED) > 350


@pytest.mark.parametrize("module", NUMBERS, ids=lambda module: module.__name__)
def test_nothing_is_declared_and_compared_with_nothing(module: ModuleType) -> None:
    compared = {*NUMBERS[module], *STRUCTS.get(module, {}), *OWN[module]}
    declared = declared_in(module)
    assert declared <= compared, sorted(declared - compared)
    assert compared <= declared, sorted(compared - declared)


def test_a_format_that_is_wrong_is_seen() -> None:
    right = layout("<QIHH", "struct vring_desc", ["addr", "len", "flags", "next"])
    assert right["offsetof(struct vring_desc, flags)"] == 12
    assert right != layout("<IQHH", "struct vring_desc", ["addr", "len", "flags", "next"])
    with pytest.raises(ValueError):
        layout("<QIH", "struct vring_desc", ["addr", "len", "flags", "next"])
    with pytest.raises(AssertionError):
        layout("@QIHH", "struct vring_desc", ["addr", "len", "flags", "next"])
